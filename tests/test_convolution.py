"""Weight gradients by matrix products equal those of autograd."""
import pytest
import torch
from torch import nn

from model import build_model
from utils import convolution
from utils.convolution import Convolution, fast_convolutions


@pytest.mark.parametrize("channels, outputs, size, kernel, stride, padding", [
    (5, 7, 8, (3, 3), (1, 1), (1, 1)), (4, 6, 9, (3, 3), (2, 2), (1, 1)), (3, 2, 9, (5, 3), (2, 1), (2, 0)),
    (6, 5, 6, (1, 1), (2, 2), (0, 0))])
@pytest.mark.parametrize("few", [1, 10**6])
def test_the_gradients_are_those_of_autograd(monkeypatch, channels, outputs, size, kernel, stride, padding, few):
    monkeypatch.setattr(convolution, "PATCHES", few)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, size, size, dtype=torch.float64, generator=random).requires_grad_()
    weight = torch.randn(outputs, channels, *kernel, dtype=torch.float64, generator=random).requires_grad_()
    expected = torch.conv2d(images, weight, None, stride, padding)
    found = Convolution.apply(images, weight, stride, padding)
    assert torch.equal(found, expected)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    for ours, theirs in zip(torch.autograd.grad(found, (images, weight), gradient),
                            torch.autograd.grad(expected, (images, weight), gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_wide_convolutions_that_learn_are_replaced(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    context = fast_convolutions(torch.device("cpu"), torch.float32)
    images = torch.randn(2, 64, 4, 4)
    replaced = nn.Conv2d(64, 8, 3, bias=False)
    others = [nn.Conv2d(64, 8, 3), nn.Conv2d(64, 8, 1, bias=False), nn.Conv2d(64, 8, 3, bias=False, groups=2),
              nn.Conv2d(64, 8, 3, bias=False, padding="same"), nn.Conv2d(64, 8, 2, bias=False, dilation=2),
              nn.Conv2d(64, 8, 3, bias=False).requires_grad_(False)]
    with context:
        assert type(replaced(images).grad_fn).__name__ == "ConvolutionBackward"
        assert not any(type(conv(images).grad_fn).__name__ == "ConvolutionBackward" for conv in others)
        with torch.inference_mode():
            assert replaced(images).grad_fn is None


@pytest.mark.parametrize("device, dtype, capability", [
    ("cuda", torch.float32, "AVX2"), ("cpu", torch.bfloat16, "AVX2"), ("cpu", torch.float32, "AVX512")])
def test_convolutions_are_only_replaced_on_measured_devices(monkeypatch, device, dtype, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with fast_convolutions(torch.device(device), dtype) as mode:
        assert mode is None


def test_a_network_has_the_same_gradients_either_way(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    calls, apply = [], Convolution.apply
    monkeypatch.setattr(Convolution, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
    torch.manual_seed(0)
    network, images = build_model("preresnet20", 5).double(), torch.randn(4, 3, 32, 32).double()
    gradients = []
    for context in (fast_convolutions(torch.device("cpu"), torch.float32), torch.enable_grad()):
        network.zero_grad()
        with context:
            network(images).logsumexp(1).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert len(calls) == 5  # the wide ones of the last stage
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
