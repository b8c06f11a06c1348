"""Image generator of Micaelli & Storkey (ZSKT, NeurIPS 2019, arXiv:1905.09768) and Fang et al. (CMI, IJCAI 2021,
arXiv:2105.08584): a linear layer, two upsampling layers, three convolutions."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datafree.distiller import DataSpec
from utils import seeds
from utils.errors import UserError
from utils.losses import at_least_float32


class Generator(nn.Module):
    """Generator from latent vectors (B, latent_size) to images (B, 3, image_size, image_size).

    By default the last layer is a batch norm, as in ZSKT: the images are unbounded and approximately normalized, like
    the input of a network. With `pixels` it is a sigmoid: pixels in [0, 1]. `width`: channels before the first
    upsampling, 128 in ZSKT and CMI, 256 in DAFL and DFQ. Raises ValueError if `image_size` is not a multiple of 4.
    """

    def __init__(self, latent_size: int = 100, image_size: int = 32, *, width: int = 128, pixels: bool = False) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"the image size of a generator must be a multiple of 4, not {image_size}")
        self.latent_size, self.width = latent_size, width
        self.start = image_size // 4  # height and width before upsampling
        self.linear = nn.Linear(latent_size, width * self.start**2)
        bias = not pixels
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 128, 3, padding=1, bias=bias),
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1, bias=bias),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, 3, 3, padding=1),
            nn.Identity() if pixels else nn.BatchNorm2d(3),
        )
        self.pixels = pixels

    def forward(self, latents: Tensor) -> Tensor:
        images = self.layers(self.linear(latents).view(-1, self.width, self.start, self.start))
        return at_least_float32(images).sigmoid() if self.pixels else images  # bfloat16 loses gray levels

    @torch.no_grad()
    def reinitialize(self, random: torch.Generator) -> None:
        """Draw weights from N(0, 0.02), or N(1, 0.02) in batch norms; set biases to 0; keep running statistics."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                drawn = torch.randn(module.weight.shape, generator=random)  # on the CPU: equal on all devices
                module.weight.copy_(mean + 0.02 * drawn)
                if module.bias is not None:
                    module.bias.zero_()


def build_generator(latent_size: int, spec: DataSpec, seed: int, **options: Any) -> Generator:
    """Build a generator on the device, with weights drawn by the seed. Raises UserError for a bad image size."""
    torch.manual_seed(seeds.derive_seed(seed, "generator"))
    try:
        generator = Generator(latent_size, spec.image_size, **options)
    except ValueError as error:
        raise UserError(f'"image_size": {error}') from None
    return generator.to(spec.mean.device).to(memory_format=torch.channels_last).train()
