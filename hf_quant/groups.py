"""Groups: which sites of a block read the same tensor, in which order, and which module produced it.

Found by watching one forward of the block, not by a table of architectures: sites whose inputs share storage form a
group, and a norm whose output is that storage is its producer, if nothing else reads it. Other producers: `pairs`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import first_tensor
from hf_quant.left_products import left_products
from hf_quant.sites import Site, SiteGroup


@dataclass(slots=True, eq=False)
class Trace:
    """What one forward showed of the leaves of a block; its tensors are kept alive, so storage tells them apart."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)  # leaf modules in order of execution
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)


def find_groups(block: nn.Module, block_name: str, sites: list[Site], run: Any) -> list[SiteGroup]:  # noqa: ANN401
    """Groups of `sites` (all inside `block`) in order of execution; sites that never ran come last, each alone.

    Args:
        run: calls the block once on real inputs.
    """
    trace = trace_of(block, block_name, run)
    by_name = {s.name: s for s in sites}
    groups: dict[Any, list[Site]] = {}
    for name, x in trace.inputs:
        if name in by_name and not any(by_name[name] in g for g in groups.values()):
            groups.setdefault(_key(x), []).append(by_name[name])
    found = [
        SiteGroup(tuple(members), _producer(block, block_name, key, members, trace)) for key, members in groups.items()
    ]
    reached = {s.name for g in found for s in g.sites}
    return found + [SiteGroup((s,)) for s in sites if s.name not in reached]


def _key(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()


def trace_of(block: nn.Module, block_name: str, run: Any) -> Trace:  # noqa: ANN401
    """Run the block once and write down the inputs and outputs of its leaves."""
    trace, handles = Trace(), []

    def pre(name: str) -> Any:  # noqa: ANN401
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if tensors:
                trace.inputs.append((name, tensors[0]))

        return hook

    def post(name: str) -> Any:  # noqa: ANN401
        def hook(_: nn.Module, args: Any, out: Any) -> None:  # noqa: ANN401
            if isinstance(out, Tensor):
                trace.outputs.append((name, first_tensor(out)))

        return hook

    leaves = [path for path, module in block.named_modules() if not any(module.children())]
    whole = f"{block_name}." if block_name else ""
    for path in leaves:
        module, name = block.get_submodule(path), whole + path
        handles.append(module.register_forward_pre_hook(pre(name), with_kwargs=True))
        handles.append(module.register_forward_hook(post(name)))
    see = lambda path, x: trace.inputs.append((whole + path, x))  # noqa: E731
    try:
        with torch.no_grad(), left_products(block, leaves, see):
            run(block)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _producer(block: nn.Module, block_name: str, key: Any, members: list[Site], trace: Trace) -> str | None:  # noqa: ANN401
    names = {m.name for m in members}
    if any(_key(x) == key and n not in names for n, x in trace.inputs):
        return None  # something that is not quantized reads it too
    for name, out in trace.outputs:
        if _key(out) == key and "norm" in type(_module(block, block_name, name)).__name__.lower():
            return name
    return None


def _module(block: nn.Module, block_name: str, name: str) -> nn.Module:
    return block.get_submodule(inside(name, block_name))


def inside(name: str, block: str) -> str:
    """The path in a block of a module of the model."""
    return name.removeprefix(block).removeprefix(".")
