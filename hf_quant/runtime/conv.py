"""Convolutions as matrices: `y = unfold(x) W^T + b` with `W` `[O, I kh kw]`; what is made for linear layers fits.

Where weights alone are quantized the product runs as the convolution it is, on the dequantized weight: unfolding takes
`kh kw` times the memory of the input, and pays off only when the unfolded input is itself multiplied in few bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_quant.operators import need_operator
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.stand_in import Part, StandIn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class UnfoldedConv(StandIn):
    """Stands in for an ungrouped convolution; its one matrix is the child `matrix`.

    It is an instance of the convolution's class too, for code that asks (adapters, offloading): `weight` and `bias`
    are the matrix's in the convolution's shape.
    """

    stock_weight: ClassVar[str] = "weight"
    _as_leaf: ClassVar[bool] = False
    matrix: nn.Linear
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Plain, ungrouped, zero-padded; patch embeddings (stride = kernel) stay what they are."""
        return (
            type(module) in _STAND_INS
            and isinstance(module, _ConvNd)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and (module.kernel_size != module.stride or set(module.kernel_size) == {1})
        )

    @classmethod
    def of(cls, module: nn.Module) -> "UnfoldedConv":
        """See `StandIn.of`."""
        assert isinstance(module, _ConvNd)  # noqa: S101  `takes` has looked at it
        self = _STAND_INS[type(module)].__new__(_STAND_INS[type(module)])
        nn.Module.__init__(self)  # the convolution's own would allocate a weight
        own = set(vars(nn.Module()))
        self.__dict__.update({k: v for k, v in vars(module).items() if k not in own})
        self.training = module.training
        weight, bias = module.weight, module.bias
        assert bias is None or isinstance(bias, nn.Parameter)  # noqa: S101  a convolution's
        matrix = nn.Linear(weight[0].numel(), weight.shape[0], bias=False, device="meta")
        matrix.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
        matrix.register_parameter("bias", bias)
        self.matrix = matrix.train(module.training)
        need_operator("unfold")
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also where it is unpickled."""
        need_operator("unfold")
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """`[O, I, k...]`: the matrix in the convolution's shape."""
        return self.matrix.weight.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        """The matrix's."""
        return self.matrix.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[B, I, ...]` (or without B) -> `[B, O, ...]`."""
        if (dense := self._dense(x.dtype)) is not None:
            convolve = _CONV[len(self.kernel_size)]
            y: Tensor = convolve(x, dense, self._bias(x.dtype), self.stride, self.padding, self.dilation)
            return y
        batched = x.dim() == len(self.kernel_size) + 2
        y = self.matrix(self.unfold(x if batched else x[None])).movedim(-1, 1)
        return y if batched else y[0]

    def unfold(self, x: Tensor) -> Tensor:
        """`[B, I, ...]` -> `[B, positions..., I k...]`, the rows that the matrix multiplies."""
        if pads := self._pads():
            x = F.pad(x, pads)
        rows: Tensor = torch.ops.hf_quant.unfold(x, self.kernel_size, self.stride, self.dilation)
        return rows

    def _pads(self) -> list[int]:
        """As `F.pad` takes them: the last axis first."""
        if self.padding == "valid":
            return []
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [side for t in reversed(totals) for side in (t // 2, t - t // 2)]
        sides = [int(p) for p in self.padding for _ in range(2)]
        return sides[::-1] if any(sides) else []

    def _dense(self, dtype: torch.dtype) -> Tensor | None:
        """The weight to convolve with; None where somebody has to see the rows: integer products, hooks, adapters."""
        matrix = self.matrix
        if isinstance(matrix, QuantLinear):
            if matrix.layer.inputs is not None:
                return None
            return matrix.dequantize(dtype).reshape(self.out_channels, self.in_channels, *self.kernel_size)
        watched = matrix._forward_pre_hooks or matrix._forward_hooks or "forward" in vars(matrix)
        return self.weight if isinstance(matrix, nn.Linear) and not watched else None

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.matrix.bias is None else self.matrix.bias.to(dtype)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:  # noqa: ANN401
        """As any module's; where a network is walked (`memo`) inside `as_leaves`, itself alone."""
        every = super().named_modules(memo, prefix, remove_duplicate)
        alone = UnfoldedConv._as_leaf and memo is not None
        return (found for found in every if found[1] is self) if alone else every

    def put_back(self) -> nn.Module:
        """See `StandIn.put_back`."""
        kind = next(plain for plain, own in _STAND_INS.items() if type(self) is own)
        conv = kind.__new__(kind)
        nn.Module.__init__(conv)
        own = set(vars(nn.Module()))
        conv.__dict__.update({k: v for k, v in vars(self).items() if k not in own})
        conv.training = self.training
        weight = self.matrix.weight.detach().reshape(self.out_channels, self.in_channels, *self.kernel_size)
        conv.weight = nn.Parameter(weight.contiguous(), requires_grad=self.matrix.weight.requires_grad)
        conv.register_parameter("bias", self.matrix.bias)
        return conv

    def members(self, name: str, value: Tensor) -> Iterator[tuple[str, Part, Tensor]]:
        """See `StandIn.members`."""
        yield ("matrix", "weight", value.flatten(1)) if name == "weight" else ("matrix", "bias", value)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  nn.Module's own
        if name == "bias" and (value is None or isinstance(value, nn.Parameter)):
            self.matrix.register_parameter(
                "bias", value
            )  # the property has no setter: nn.Module would register a second one
            return
        super().__setattr__(name, value)


class UnfoldedConv1d(UnfoldedConv, nn.Conv1d):  # type: ignore[override]  # its parameters are views here
    """Over one axis."""


class UnfoldedConv2d(UnfoldedConv, nn.Conv2d):  # type: ignore[override]  # its parameters are views here
    """Over two axes."""


class UnfoldedConv3d(UnfoldedConv, nn.Conv3d):  # type: ignore[override]  # its parameters are views here
    """Over three axes."""


@contextmanager
def as_leaves() -> Iterator[None]:
    """Inside, a stand-in's matrix is no module of its own to code that walks a network, as a convolution has none."""
    before, UnfoldedConv._as_leaf = UnfoldedConv._as_leaf, True
    try:
        yield
    finally:
        UnfoldedConv._as_leaf = before


def convolutions(root: nn.Module) -> dict[nn.Module, UnfoldedConv]:
    """Matrix -> its convolution. One range for all values rounds an image as it rounds its rows, many times fewer."""
    return {conv.matrix: conv for conv in root.modules() if isinstance(conv, UnfoldedConv)}


_STAND_INS: dict[type[nn.Module], type[UnfoldedConv]] = {
    nn.Conv1d: UnfoldedConv1d,
    nn.Conv2d: UnfoldedConv2d,
    nn.Conv3d: UnfoldedConv3d,
}
