"""Weight gradients of convolutions by matrix products, on CPUs whose library is slow at them.

With AVX2 and float32, oneDNN computes the weight gradient of a wide convolution at about 60 % of the rate of its other
two passes. Gathering the patches of a few images and multiplying them speeds up forward and backward together by a
factor of 1.05 to 1.4 (docs/benchmarks.md), from about 48 input channels on; 1x1 kernels gain nothing.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

MIN_CHANNELS = 48
PATCHES = 2**21  # float32 values gathered at once: 8 MiB


def fast_convolutions(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Context for forward passes in `dtype` with fast weight gradients; no higher-order gradients."""
    slow = device.type == "cpu" and dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return _Wide() if slow else nullcontext()


class _Wide(TorchFunctionMode):
    """Routes wide trainable convolutions through `Convolution`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.conv2d and len(arguments) == 7 and not options:  # as nn.Conv2d calls it
            images, weight, bias, stride, padding, dilation, groups = arguments
            learns = weight.requires_grad and torch.is_grad_enabled()
            if (learns and bias is None and weight.shape[1] >= MIN_CHANNELS and weight.shape[2:].numel() > 1
                    and groups == 1 and _pair(dilation) == (1, 1) and not isinstance(padding, str)):
                return Convolution.apply(images, weight, _pair(stride), _pair(padding))
        return function(*arguments, **(options or {}))


class Convolution(torch.autograd.Function):
    """Convolution of images (B, C, H, W) with a weight (O, C, h, w), without bias, dilation or groups."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(images, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1,
                (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(gradient, images, weight.shape, ctx.stride, ctx.padding)
        return of_images, of_weight, None, None


def _weight_gradient(gradient: Tensor, images: Tensor, shape: torch.Size, stride: tuple[int, int],
                     padding: tuple[int, int]) -> Tensor:
    """Sum of patches^T gradient over the positions of all images, (O, C, h, w)."""
    outputs, channels, *kernel = shape
    count, _, height, width = gradient.shape
    (top, left), length = padding, kernel[0] * kernel[1] * channels
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    of_image, of_row, of_column, of_channel = padded.stride()
    strides = of_image, stride[0] * of_row, stride[1] * of_column, of_row, of_column, of_channel
    patches = padded.as_strided((count, height, width, *kernel, channels), strides)  # overlapping views, no copy
    gradient = gradient.permute(0, 2, 3, 1)
    total = images.new_zeros(length, outputs)
    few = max(1, PATCHES // (height * width * length))
    for part, of_part in zip(patches.split(few), gradient.split(few), strict=True):
        total.addmm_(part.reshape(-1, length).T, of_part.reshape(-1, outputs))
    return total.view(*kernel, channels, outputs).permute(3, 2, 0, 1)
