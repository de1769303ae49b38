"""Left products: layers whose forward is never called, as their weight is multiplied into an input from outside."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def left_products(module: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> "_LeftProducts":
    """While it is entered, calls `see(path, x)` for every `W_NK @ x_KT` with a submodule's float weight.

    So a layer is seen whose forward is never called: the time steps of Mamba.
    """
    own = {p: dict(module.get_submodule(p).named_parameters(recurse=False)) for p in paths}
    # what a property makes of other tensors is another object every time, and its id soon somebody else's
    return _LeftProducts({id(named["weight"]): p for p, named in own.items() if "weight" in named}, see)


class _LeftProducts(TorchFunctionMode):
    def __init__(self, weights: Mapping[int, str], see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.weights, self.see = weights, see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's own signature
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and id(args[0]) in self.weights:
            self.see(self.weights[id(args[0])], args[1].transpose(-1, -2))
        return func(*args, **(kwargs or {}))
