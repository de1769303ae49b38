"""Pairs: whose output channels does a layer read, and what may pass between the two? Found by trying, not by names.

A producer's output is altered while the block runs, and the input of the reader is watched:

* one token's impulse: neighbouring channels with the same response are mixed over tokens by the same weights (a head);
* scaled channels: the reader's input must scale by the same factors (v -> o, up -> down, linear -> ReLU -> linear);
* shifted channels: whether the input is shifted by the same amounts (attention weights sum to one);
* rotated heads: whether the input is rotated (v -> o).

At last the scales are undone at the reader, and the block must compute what it did: nobody else reads the producer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.groups import Trace, trace_of
from hf_quant.sites import SiteGroup

Alter = Callable[[Tensor], Tensor]  # of a tensor whose last axis is the channels
Run = Callable[[nn.Module], Tensor]
# relative; factors are powers of two, so float16 and bfloat16 lose nothing in scaling
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A legal pair: output channel `channels_K[k]` of the producer is what input channel k of the readers carries.

    Attributes:
        producer: path of the module in the block (a linear layer, a convolution, a batch norm).
        readers: paths of the layers that read it, all the same tensor.
        shifts: a constant may be moved from one to the other as well.
        head: so many neighbouring channels may be rotated together; 1: scaled only.
    """

    producer: str
    readers: tuple[str, ...]
    channels_K: Tensor
    shifts: bool
    head: int


def link(groups: Sequence[SiteGroup], block: nn.Module, block_name: str, run: Run) -> list[SiteGroup]:
    """The groups, those without a producer given theirs where there is one, and norms that something else reads taken
    from theirs: an addition of the residual stream is no module that could be watched.

    Args:
        groups: of `find_groups`.
        block: the module they are in.
        block_name: its path in the model.
        run: calls the block on real inputs and returns its output.
    """
    whole = f"{block_name}." if block_name else ""
    groups = [replace(g, producer=None) if g.producer and not _alone(g, block, whole, run) else g for g in groups]
    wanted = {tuple(s.name.removeprefix(whole) for s in g.sites): i for i, g in enumerate(groups) if g.producer is None}
    linked = list(groups)
    for pair in find_pairs(block, run, list(wanted)) if wanted else []:
        at = wanted[pair.readers]
        linked[at] = replace(
            groups[at], producer=whole + pair.producer, channels=pair.channels_K, shifts=pair.shifts, head=pair.head
        )
    return linked


@torch.no_grad()
def _alone(group: SiteGroup, block: nn.Module, whole: str, run: Run) -> bool:
    """Whether its producer has a gain for each channel that it reads (heads may share one), and nobody else does."""
    gain = getattr(block.get_submodule(str(group.producer).removeprefix(whole)), "weight", None)
    if not isinstance(gain, Tensor) or gain.numel() != group.sites[0].shape[1]:
        return False
    readers = tuple(s.name.removeprefix(whole) for s in group.sites)
    reader: Any = block.get_submodule(readers[0])
    K, g = group.sites[0].shape[1], torch.Generator().manual_seed(0)
    f_K = (2.0 ** torch.randint(-2, 3, (K,), generator=g)).to(reader.weight)
    return _private(block, run, str(group.producer).removeprefix(whole), readers, f_K, torch.arange(K))


@torch.no_grad()
def find_pairs(block: nn.Module, run: Run, readers: Sequence[tuple[str, ...]]) -> list[Pair]:
    """The producer of each group of readers (paths in the block) that has one."""
    trace = trace_of(block, "", run)
    first = {name: i for i, (name, _) in reversed(list(enumerate(trace.inputs)))}
    single = {name for name, _ in trace.outputs}  # a router answers with several tensors
    order = [name for name in first if name in single and _makes_channels(block.get_submodule(name))]
    groups = [g for g in readers if all(r in first for r in g)]
    found: dict[tuple[str, ...], Pair] = {}
    for name in order:
        earlier = [g for g in groups if name not in g and first[name] < min(first[r] for r in g)]
        fit = [g for g in earlier if _inputs(block, trace, g).shape[-1] % _channels(trace, block, name) == 0]
        if not fit:
            continue
        doubled = _observe(block, run, name, lambda y: y * 2, [g[0] for g in fit])
        for group in fit:
            if _same(doubled[group[0]], 2 * _inputs(block, trace, group)):
                pair = _examine(block, run, trace, name, group)
                if pair is not None:
                    found[group] = pair  # a later producer is the nearer one
    return [found[g] for g in groups if g in found]


def _examine(block: nn.Module, run: Run, trace: Trace, producer: str, group: tuple[str, ...]) -> Pair | None:
    x, C = _inputs(block, trace, group), _channels(trace, block, producer)
    K, reader = x.shape[-1], group[0]

    def seen(alter: Alter) -> Tensor:
        return _observe(block, run, producer, alter, [reader])[reader]

    impulse = seen(_impulse)
    if not impulse.numel():
        return None
    head = _head(impulse, C)
    repeats = torch.arange(C).view(-1, 1, head).expand(-1, K // C, -1).reshape(-1)
    g = torch.Generator().manual_seed(0)
    f_C = (2.0 ** torch.randint(-2, 3, (C,), generator=g)).to(x)
    scaled = seen(lambda y: y * f_C)
    for channels_K in (repeats, torch.arange(C).repeat(K // C)):
        if _same(scaled, x * f_C[channels_K]):
            break
    else:
        return None
    if not _private(block, run, producer, group, f_C, channels_K):
        return None
    z_C = x.abs().mean() * torch.randn(C, generator=g).to(x)
    shifted = seen(lambda y: y + z_C)
    shifts = shifted.shape == x.shape and _same(shifted - x, z_C[channels_K].expand_as(x))
    if head > 1:
        R = torch.linalg.qr(torch.randn(head, head, generator=g))[0].to(x)
        rotate: Alter = lambda t: (t.unflatten(-1, (-1, head)) @ R).flatten(-2)  # noqa: E731
        head = head if _same(seen(rotate), rotate(x)) else 1
    return Pair(producer, group, channels_K, shifts, head)


def _private(
    block: nn.Module, run: Run, producer: str, group: tuple[str, ...], f_C: Tensor, channels_K: Tensor
) -> bool:
    """Whether scaling the producer is undone by scaling the inputs of the group: nobody else reads it."""
    before = run(block)
    handles = [_on_output(block.get_submodule(producer), lambda y: y * f_C)]
    handles += [_on_input(block.get_submodule(r), lambda x: x / f_C[channels_K]) for r in group]
    try:
        return _same(run(block), before)
    finally:
        for handle in handles:
            handle.remove()


def _impulse(y: Tensor) -> Tensor:
    """One for the first token, in every channel, else zero."""
    impulse = torch.zeros_like(y)
    impulse[(..., 0, slice(None)) if y.dim() > 1 else ...] = 1
    return impulse


def _head(response: Tensor, C: int) -> int:
    """How many neighbouring channels respond alike, in runs that divide all channels evenly."""
    columns = response.reshape(-1, response.shape[-1]).float()
    differs = ((columns[:, 1:] - columns[:, :-1]).abs() > 1e-6 * columns.abs().amax()).any(0)
    return gcd(C, *(differs.nonzero()[:, 0] + 1).tolist())


def _observe(block: nn.Module, run: Run, producer: str, alter: Alter, readers: Sequence[str]) -> dict[str, Tensor]:
    """The inputs of the readers (channels last) when the producer's output is altered: none to an expert that is then
    not chosen.
    """
    seen: dict[str, Tensor] = {}
    handles = [_on_output(block.get_submodule(producer), alter)]
    for reader in readers:
        keep: Alter = lambda x, reader=reader: seen.setdefault(reader, x)  # type: ignore[misc]  # noqa: E731
        handles.append(_on_input(block.get_submodule(reader), keep))
    try:
        run(block)
    finally:
        for handle in handles:
            handle.remove()
    return {reader: seen.get(reader, torch.empty(0)) for reader in readers}


def _on_output(module: nn.Module, alter: Alter) -> Any:  # noqa: ANN401  torch's handle
    axis = channel_axis(module)
    return module.register_forward_hook(lambda _m, _a, y: alter(y.movedim(axis, -1)).movedim(-1, axis))


def _on_input(module: nn.Module, alter: Alter) -> Any:  # noqa: ANN401
    axis = channel_axis(module)

    def pre(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return alter(args[0].movedim(axis, -1)).movedim(-1, axis), *args[1:]

    return module.register_forward_pre_hook(pre)


def channel_axis(module: nn.Module) -> int:
    """Where a module's channels are in its input and output: second for images and norms over them, else last."""
    image = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.modules.batchnorm._BatchNorm | nn.GroupNorm
    return 1 if isinstance(module, image) else -1


def _makes_channels(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not isinstance(module, nn.Embedding)


def _channels(trace: Trace, block: nn.Module, name: str) -> int:
    out = next(y for n, y in trace.outputs if n == name)
    return out.shape[channel_axis(block.get_submodule(name))]


def _inputs(block: nn.Module, trace: Trace, group: tuple[str, ...]) -> Tensor:
    x = next(x for n, x in trace.inputs if n == group[0])
    return x.movedim(channel_axis(block.get_submodule(group[0])), -1)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().amax() <= TOLERANCE[a.dtype] * b.abs().amax().clamp_min(1e-12))
