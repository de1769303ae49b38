"""WeightView: the logical weight of a packed module. Looks like a dense tensor, costs nothing until an op reads it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Owner(Protocol):
    """What a view needs of the module it looks at."""

    compute_dtype: torch.dtype

    @property
    def qweight(self) -> Tensor:
        """Says where the module is."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the logical weight."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logical weight, dense."""

    def requantize_(self, W_NK: Tensor) -> None:
        """Quantize another logical weight into the module."""


class WeightView(torch.Tensor):
    """`[N, K]` view of a packed module, in its compute dtype.

    Shape, dtype and device are free. Any operator sees the dequantized matrix. What is written in place, assigned to
    `.data` or through `[...] =` is quantized back into the module. Views and slices are dense copies.
    """

    owner: Owner
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, owner: Owner) -> "WeightView":
        """A view of `owner`."""
        view: WeightView = torch.Tensor._make_wrapper_subclass(
            cls, owner.matrix_shape, dtype=owner.compute_dtype, device=owner.qweight.device, requires_grad=False
        )
        view.owner = owner
        view._is_hf_initialized = True  # transformers.initialization.* then leaves it alone
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch documents this

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch documents it as a class method
        cls,
        func: Any,  # noqa: ANN401  torch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run `func` on dense matrices; quantize back the views that it writes to."""
        kwargs = dict(kwargs or {})
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].owner)
        dense: dict[int, Tensor] = {}

        def open_view(view: WeightView) -> Tensor:
            if id(view) not in dense:
                dense[id(view)] = view.owner.dequantize().to(view.dtype)
            return dense[id(view)]

        result = func(*tree_map_only(cls, open_view, args), **tree_map_only(cls, open_view, kwargs))
        targets = [view for view in written(func, args, kwargs) if isinstance(view, cls)]
        for view in targets:
            view.owner.requantize_(dense[id(view)])
        return targets[0] if targets else result

    @property
    def data(self) -> "WeightView":
        """Itself: it never tracks gradients."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if not (isinstance(value, WeightView) and value.owner is self.owner):
            self.owner.requantize_(value.detach())

    def __setitem__(self, index: Any, value: Any) -> None:  # noqa: ANN401  as torch.Tensor takes it
        """Write a part: dequantize, write, quantize back."""
        dense = self.owner.dequantize()
        dense[index] = value
        self.owner.requantize_(dense)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A dense copy: a view cannot outlive its module."""
        return self.owner.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401
        """Pickled as a dense tensor."""
        return self.owner.dequantize().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # noqa: ANN401
        return f"WeightView({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:  # noqa: ANN401
    """The arguments that the operator's schema marks as written to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return found
