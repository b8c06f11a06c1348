"""The generator of ZSKT: Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching",
NeurIPS 2019, arXiv:1905.09768."""
from __future__ import annotations

from torch import Tensor, nn


class Generator(nn.Module):
    """Latent vectors (B, latent_size) to images (B, channels, image_size, image_size).

    The last layer is a batch norm and nothing bounds it: the images are roughly standardised, as a network's input is
    after normalisation. ValueError for an image size that is not a multiple of 4.
    """

    def __init__(self, latent_size: int = 100, image_size: int = 32, channels: int = 3) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"the generator makes images whose size is a multiple of 4, not {image_size}")
        self.latent_size = latent_size
        self.start = image_size // 4  # height and width before the two doublings
        self.linear = nn.Linear(latent_size, 128 * self.start**2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(self.linear(latents).view(-1, 128, self.start, self.start))
