"""Generators of images, as Micaelli & Storkey (ZSKT, NeurIPS 2019, arXiv:1905.09768) and Fang et al. (CMI, IJCAI 2021,
arXiv:2105.08584) use them: a linear layer, two doublings, three convolutions."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datafree.distiller import DataSpec
from utils import seeds
from utils.errors import UserError
from utils.losses import at_least_float32


class Generator(nn.Module):
    """Latent vectors (B, latent_size) to images (B, 3, image_size, image_size).

    ZSKT's ends in a batch norm and nothing bounds it: the images are roughly standardised, as a network's input is
    after normalisation. With `pixels` it ends in a sigmoid: pixels in [0, 1]. `width`: channels before the first
    doubling; 128 in ZSKT and CMI, 256 in DAFL and DFQ. ValueError for an image size that is not a multiple of 4.
    """

    def __init__(self, latent_size: int = 100, image_size: int = 32, *, width: int = 128, pixels: bool = False) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"the generator makes images whose size is a multiple of 4, not {image_size}")
        self.latent_size, self.width = latent_size, width
        self.start = image_size // 4  # height and width before the two doublings
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
        return at_least_float32(images).sigmoid() if self.pixels else images  # bfloat16 has steps of a grey level

    @torch.no_grad()
    def reinitialize(self, random: torch.Generator) -> None:
        """Weights from N(0, 0.02), those of batch norms from N(1, 0.02), biases 0; running statistics stay."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
                drawn = torch.randn(module.weight.shape, generator=random)  # on the CPU: the same on every device
                module.weight.copy_(mean + 0.02 * drawn)
                if module.bias is not None:
                    module.bias.zero_()


def build_generator(latent_size: int, spec: DataSpec, seed: int, **options: Any) -> Generator:
    """A generator on the device, its initial weights from the seed. UserError for an image size that it cannot make."""
    torch.manual_seed(seeds.derive_seed(seed, "generator"))
    try:
        generator = Generator(latent_size, spec.image_size, **options)
    except ValueError as error:
        raise UserError(f'"image_size": {error}') from None
    return generator.to(spec.mean.device).to(memory_format=torch.channels_last).train()
