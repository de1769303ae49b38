"""CPU kernel: integers times integers, rescaled once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.runtime.activation import quantize_input
from hf_quant.spec import Spec

LONGEST_SUM = (2**31 - 1) // (255 * 128)  # products of 8-bit codes that an int32 always holds


@dataclass(frozen=True, slots=True)
class Int8Mm:
    """`torch._int_mm`: `y = (x_int W_int^T - x_zero sum_k W_int) x_scale scale`, exact until the last line.

    Unsigned codes go in less 128, their zero point too: torch before 2.12 multiplies signed bytes only.
    """

    name: ClassVar[str] = "torch-int8-mm"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if device.type != "cpu":
            return f"runs on cpu, not {device.type}"
        if layer.shape[1] > LONGEST_SUM:
            return f"sums of more than {LONGEST_SUM} products can overflow, and there are {layer.shape[1]} inputs"
        return None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[sum of each row, int32 `[N]`] when inputs have a zero point, else nothing: the canonical bytes serve."""
        assert layer.inputs is not None  # noqa: S101  the format holds no others
        return [tensors["qweight"].sum(1, dtype=torch.int32)] if _shifted(layer.inputs) else []

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        assert layer.inputs is not None  # noqa: S101
        if x_TK.shape[0] == 0:
            return x_TK.new_empty(0, layer.shape[0])
        x, grid = quantize_input(x_TK, layer.inputs, tensors), layer.inputs.grid
        assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
        x_int = x.codes + grid.low if grid.signed else x.codes ^ 0x80
        sums = torch._int_mm(x_int.view(torch.int8), tensors["qweight"].T)
        if _shifted(layer.inputs):
            zero = 0 if x.zero is None else x.zero.int()
            sums -= (zero - (0 if grid.signed else 128)) * blob[0]
        return (sums.float() * x.scale * tensors["scale"].float().T).to(x_TK.dtype)


def _shifted(inputs: Spec) -> bool:
    """Whether zero is another code than 0."""
    return inputs.zero != "none" or not getattr(inputs.grid, "signed", True)
