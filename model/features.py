"""Activations by name: inputs and outputs of the modules of a network in forward passes.

    with capture_outputs(network, "layer1", "layer2") as captured:
        logits = network(images)
    captured["layer2"]  # (B, C, H, W), with its autograd graph

This works for any network, also in autocast, in a recorded CUDA graph and in a compiled function that enters the
context; a network that was compiled before calls no hooks. Hooks exist only inside the context.

Names are those of `network.named_modules()`. `stages`, `paired_stages`, `classifier` and `batch_norms` find the names
that methods need.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class Call(NamedTuple):
    """Call of a module, with its input or output tensor."""

    name: str
    module: nn.Module
    value: Tensor


class Captured:
    """Tensors captured in all forward passes since the context was entered.

    `captured[name]` is the tensor of the last call of a module; KeyError if it has not been called. `captured.calls`
    lists all calls in order of execution; a shared module has several.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getitem__(self, name: str) -> Tensor:
        for call in reversed(self.calls):
            if call.name == name:
                return call.value
        raise KeyError(f"module {name!r} has not been called")


def capture_inputs(network: nn.Module, *names: str) -> AbstractContextManager[Captured]:
    """Context that captures the inputs of the named modules: for each call, the first tensor among the arguments.

    Tensors are not copied, so later in-place changes, as by `ReLU(inplace=True)`, are visible. Raises ValueError for an
    unknown name.
    """
    def register(module: nn.Module, record: Callable[[Any], None]) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            record((*arguments, *options.values()))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    return _capture(network, names, register)


def capture_outputs(network: nn.Module, *names: str) -> AbstractContextManager[Captured]:
    """Context that captures the outputs of the named modules: for each call, the output or the first tensor of a tuple.

    See `capture_inputs` for in-place changes and errors.
    """
    def register(module: nn.Module, record: Callable[[Any], None]) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            record(output)

        return module.register_forward_hook(hook)

    return _capture(network, names, register)


@contextmanager
def _capture(network: nn.Module, names: tuple[str, ...],
             register: Callable[[nn.Module, Callable[[Any], None]], RemovableHandle]) -> Iterator[Captured]:
    captured = Captured()
    modules = {name: _submodule(network, name) for name in names}
    with ExitStack() as hooks:
        for name, module in modules.items():
            def record(values: Any, name: str = name, module: nn.Module = module) -> None:
                value = _first_tensor(values)
                if value is not None:
                    captured.calls.append(Call(name, module, value))

            hooks.enter_context(register(module, record))
        yield captured


def _submodule(network: nn.Module, name: str) -> nn.Module:
    if isinstance(network, DistributedDataParallel):  # names are those of the wrapped network
        network = network.module
    try:
        return network.get_submodule(name)
    except AttributeError:
        near = get_close_matches(name, [known for known, _ in network.named_modules()], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"the network has no module {name!r}{hint}") from None


def _first_tensor(values: Any) -> Tensor | None:
    if isinstance(values, tuple | list):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return values if isinstance(values, Tensor) else None


# -- names of modules ----------------------------------------------------------------------------------------------


def batch_norms(network: nn.Module) -> list[str]:
    """Names of the 2-d batch norms with running statistics."""
    return [name for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None]


def classifier(network: nn.Module, image_size: int = 32) -> str | None:
    """Name of the layer that computes the logits; its inputs are the penultimate features, see `pooled`.

    This is the last executed linear layer or convolution with as many outputs as there are logits; None if there is
    none. Runs the network once, like `stages`.
    """
    run = _probe(network, image_size)
    if run.output_shape is None:
        return None
    for call in reversed(list(run.descendants())):
        linear, convolution = isinstance(call.module, nn.Linear), isinstance(call.module, nn.Conv2d)
        if (linear or convolution) and call.output_shape is not None and \
                call.output_shape[-1 if linear else 1] == run.output_shape[-1]:
            return call.name
    return None


def pooled(features: Tensor) -> Tensor:
    """Average features (B, D, H, W) over positions to (B, D); features (B, D) are returned unchanged."""
    return features if features.ndim == 2 else features.flatten(2).mean(2)


def stages(network: nn.Module, image_size: int = 32) -> dict[str, tuple[int, int]]:
    """Names of the modules whose outputs (B, C, H, W) end the stages of a network, in order, with their (H, W).

    A stage lies between two halvings of height and width; the last stage has more than one position. It ends with its
    last block, the outermost module that has a convolution and halves the size at most once. Modules without a
    convolution after a block, such as the final batch norm of a pre-activation network, do not count; after a single
    convolution they do. A network that never halves the size, such as `mlp` or a vision transformer, has no stages: {}.

    Runs the network once on a black image, (1, 3, image_size, image_size), in eval mode. Modes, buffers and random
    number generators are restored. Errors of the network, such as for an unsupported image size, are passed on.
    """
    ends = []
    for trunk in _split_at_halvings(_trunk(_probe(network, image_size))):
        blocks = [part for part in trunk if any(parameter.ndim == 4 for parameter in part.run.module.parameters())]
        if blocks:
            ends.append(blocks[-1] if blocks[-1].run.parts else trunk[-1])
    return {end.run.name: end.size for end in ends} if len(ends) > 1 else {}


def paired_stages(first: nn.Module, second: nn.Module, image_size: int = 32) -> list[tuple[str, str]]:
    """Pairs of stage names of two networks that can be compared: each stage of the first network, with the stage of the
    second that has the nearest height and width, if they differ by less than a halving."""
    pairs, others = [], stages(second, image_size)
    for name, size in stages(first, image_size).items():
        for other in sorted(others, key=lambda other: abs(math.log(math.prod(others[other]) / math.prod(size))))[:1]:
            if not _is_halved(size, others[other]) and not _is_halved(others[other], size):
                pairs.append((name, other))
    return pairs


@dataclass
class _ModuleCall:
    """Call of a module during a probe: shapes of input and output, and nested calls."""

    name: str
    module: nn.Module
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None
    parts: list[_ModuleCall] = field(default_factory=list)

    def descendants(self) -> Iterator[_ModuleCall]:
        """Nested calls at any depth, in the order in which they ended."""
        for part in self.parts:
            yield from part.descendants()
            yield part


class _SizedCall(NamedTuple):
    """Call with output (B, C, H, W), and its (H, W)."""

    run: _ModuleCall
    size: tuple[int, int]


def run_once(network: nn.Module, image_size: int, *, count: int = 1, training: bool = False) -> Any:
    """Run a network on black images, (count, 3, image_size, image_size), in eval or training mode, without gradients
    and in the precision of its weights. Modes, buffers and random number generators are restored."""
    weight = next(network.parameters(), torch.empty(()))
    images = torch.zeros(count, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    modes = {module: module.training for module in network.modules()}
    try:
        network.train(training)
        # Without autocast: older releases of torch would keep the weights that it casts here, without gradients.
        device = "cpu" if weight.is_meta else weight.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False), \
                torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            return functional_call(network, buffers, (images,))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _probe(network: nn.Module, image_size: int) -> _ModuleCall:
    """Record the calls of a network on a black image, see `stages`."""
    top = _ModuleCall("", nn.Identity())
    with _recorded(network, top):
        run_once(network, image_size)
    return top.parts[0]


@contextmanager
def _recorded(network: nn.Module, top: _ModuleCall) -> Iterator[None]:
    """Context that appends the calls of the network, as trees, to the parts of `top`."""
    call_stack = [top]

    def pre_hook(name: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        run = _ModuleCall(name, module, input_shape=_shape((*arguments, *options.values())))
        call_stack[-1].parts.append(run)
        call_stack.append(run)

    def post_hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call_stack.pop().output_shape = _shape(output)

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(pre_hook, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(post_hook))
        yield


def _trunk(run: _ModuleCall) -> Iterator[_SizedCall]:
    """Outermost calls, in order, with an output (B, C, H, W) of several positions that halve the size at most once."""
    for part in run.parts:
        if _halves_repeatedly(part):
            yield from _trunk(part)
        elif (size := _size(part.output_shape)) is not None and size != (1, 1):
            yield _SizedCall(part, size)


def _halves_repeatedly(run: _ModuleCall) -> bool:
    """Whether a call halves the size more than once or has another output than (B, C, H, W)."""
    input_size, output_size = _size(run.input_shape), _size(run.output_shape)
    if input_size is None or output_size is None:
        return output_size is None
    sizes = (_size(part.output_shape) for part in run.descendants())
    return any(size is not None and _is_halved(input_size, size) and _is_halved(size, output_size) for size in sizes)


def _split_at_halvings(trunk: Iterator[_SizedCall]) -> list[list[_SizedCall]]:
    """Split the calls where the size is halved; larger outputs, after upsampling, are left out."""
    parts: list[list[_SizedCall]] = []
    for call in trunk:
        if not parts or _is_halved(parts[-1][0].size, call.size):
            parts.append([call])
        elif not _is_halved(call.size, parts[-1][0].size):
            parts[-1].append(call)
    return parts


def _is_halved(size: tuple[int, int], smaller: tuple[int, int]) -> bool:
    """Whether sides shrink to two thirds at most: a rounded halving, but not a convolution without padding."""
    return 9 * math.prod(smaller) <= 4 * math.prod(size)


def _shape(values: Any) -> torch.Size | None:
    value = _first_tensor(values)
    return None if value is None else value.shape


def _size(shape: torch.Size | None) -> tuple[int, int] | None:
    """(H, W) of images (B, C, H, W)."""
    return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else None
