"""Joins: which layers read what a concatenation put together, and which of their input channels came from where.

Found by watching one forward, not by a table of architectures: a module is called with the output of `torch.cat`
(the residual block of a U-Net behind a skip connection), and layers in it, or it itself, read a tensor of that shape.
Between the two there may be what keeps channels in their places: a norm, an activation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_quant.runtime.conv import UnfoldedConv
from hf_quant.sites import Site, SiteGroup

CONCATENATE = (torch.cat, torch.concat, torch.concatenate)


class _Concatenations(TorchFunctionMode):
    """Keeps what `torch.cat` puts out, with the axis and the sizes of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int, list[int]]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's own signature
        out = func(*args, **(kwargs or {}))
        if func in CONCATENATE:
            axis = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % out.dim()
            parts = args[0] if args else (kwargs or {})["tensors"]
            self.seen.append((out, axis, [part.shape[axis] for part in parts]))
        return out


@dataclass(slots=True, eq=False)
class _Seen:
    """Modules called with a concatenation, and the shapes that modules were called with."""

    made: _Concatenations = field(default_factory=_Concatenations)
    joined: dict[str, tuple[torch.Size, int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def before(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None:
            return
        self.shapes[path] = x.shape
        for out, axis, sizes in self.made.seen:
            if x is out:
                self.joined[path] = x.shape, axis, sizes


def with_joins(
    groups: Sequence[SiteGroup], block: nn.Module, block_name: str, run: Callable[[nn.Module], Any]
) -> list[SiteGroup]:
    """The groups, each with the part of a concatenation that its input channels belong to, if they do."""
    seen = _Seen()
    handles = [
        module.register_forward_pre_hook(partial(seen.before, path), with_kwargs=True)
        for path, module in block.named_modules()
    ]
    try:
        with torch.no_grad(), seen.made:
            run(block)
    finally:
        for handle in handles:
            handle.remove()
    return [replace(g, parts=_parts(g.sites[0], block, block_name, seen)) for g in groups]


def _parts(site: Site, block: nn.Module, block_name: str, seen: _Seen) -> Tensor | None:
    path = site.name.removeprefix(block_name).removeprefix(".")
    owner = path.rpartition(".")[0]
    conv = isinstance(block.get_submodule(owner), UnfoldedConv)
    path = owner if conv else path
    shape = seen.shapes.get(path)
    if shape is None:
        return None
    channels = 1 if conv else len(shape) - 1
    for joined, (of, axis, sizes) in seen.joined.items():
        inside = path == joined or path.startswith(f"{joined}.") or not joined
        if inside and of == shape and axis == channels and len(sizes) > 1:
            part_C = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            return part_C.repeat_interleave(
                site.shape[1] // len(part_C)
            )  # a convolution's columns are channel by channel
    return None
