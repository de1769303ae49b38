"""Streams: the same tokens on two paths, the quantized one and the one in full precision, side by side.

At an expert two paths can be compared token by token only if it gets the same tokens on both, and the routers of two
paths differ now and then. So the routes of one are written down and followed on the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_quant.runtime.experts import Experts

NAMES = ("hidden_states", "top_k_index", "top_k_weights")  # of what experts are called with, in order
Routes = dict[str, tuple[Tensor, Tensor]]  # path of experts -> `[T, k]` of their indices and weights


@contextmanager
def same_routes(module: nn.Module, routes: Routes) -> Iterator[None]:
    """Inside, experts follow the routes that are there already, and write down the others."""

    def hook(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        given = dict(zip(NAMES, args, strict=False)) | kwargs
        x, *own = (given[name] for name in NAMES)
        return (x, *routes.setdefault(path, tuple(own))), {}

    found = [(path, part) for path, part in module.named_modules() if isinstance(part, Experts)]
    handles = [part.register_forward_pre_hook(partial(hook, path), with_kwargs=True) for path, part in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Inputs(dict[str, list[Tensor]]):
    """What each path was called with in one forward."""

    def see(self, path: str, x: Tensor) -> None:
        """Another call. A copy: models write into what was an input."""
        self.setdefault(path, []).append(flat(x).clone())

    def beside(self, others: "Inputs") -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Each call, with the one that saw the same tokens in another forward."""
        for path, calls in self.items():
            twins: Sequence[Tensor | None] = others.get(path, [])
            if [len(x) for x in calls] != [len(x) for x in others.get(path, [])]:
                twins = [None] * len(calls)
            yield from ((path, x, twin) for x, twin in zip(calls, twins, strict=True))


def flat(x: Tensor) -> Tensor:
    """`[..., K] -> [T, K]`."""
    return x.detach().reshape(-1, x.shape[-1])
