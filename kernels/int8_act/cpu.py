"""CPU kernel: integers times integers, rescaled once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.runtime.activation import quantize_input

LONGEST_SUM = (2**31 - 1) // (255 * 128)  # products of 8-bit codes that an int32 always holds


@dataclass(frozen=True, slots=True)
class Int8Mm:
    """`torch._int_mm`: `y = (x_int W_int^T - x_zero sum_k W_int) x_scale scale`, exact until the last line."""

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
        return [] if layer.inputs.zero == "none" else [tensors["qweight"].sum(1, dtype=torch.int32)]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        assert layer.inputs is not None  # noqa: S101
        if x_TK.shape[0] == 0:
            return x_TK.new_empty(0, layer.shape[0])
        x, grid = quantize_input(x_TK, layer.inputs, tensors), layer.inputs.grid
        assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
        # _int_mm takes signed or unsigned bytes on the left, signed ones on the right
        x_int = (x.codes + grid.low).view(torch.int8) if grid.signed else x.codes
        sums = torch._int_mm(x_int, tensors["qweight"].T)
        if x.zero is not None:
            sums -= x.zero.int() * blob[0]
        return (sums.float() * x.scale * tensors["scale"].float().T).to(x_TK.dtype)
