"""The GPU kernel of `int-float-zero/1`: the main loop with zero points that are floats."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels._gemm.configs import kind
from hf_quant.kernels._gemm.kernel import MainLoop, by_row
from hf_quant.kernels._gemm.operand import Weight, unit_for
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits

WIDTHS = {5: 6, 7: 8}  # bits that take the room of the next ones in memory


@dataclass(frozen=True, slots=True)
class Triton(MainLoop):
    """`(code - zero) scale` in float32, rounded once."""

    def takes(self, layer: Layer) -> str | None:
        """Codes that are their values: a grid that begins elsewhere would round its zero points first."""
        grid = layer.weights.grid
        assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
        return None if grid.low == 0 else f"values from 0 on, not from {grid.low}"

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales float32 `[G, N]`, zero points the same]."""
        codes = unpack_bits(tensors["qweight"], int(layer.weights.grid.bits), layer.shape[1])
        words = operand(layer, kind(codes.device)).shuffle.pack(codes)
        ranges = (by_row(tensors[name].float(), layer) for name in ("scale", "zero_point"))
        return [words, *(t.expand(layer.shape[0], -1).T.contiguous() for t in ranges)]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return pack_bits(codes_NK, int(layer.weights.grid.bits))


@cache
def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it on a machine."""
    bits, group = int(layer.weights.grid.bits), layer.weights.block_size(layer.shape)[1]
    unit = unit_for(target, group, layer.shape[1])
    return Weight(layer.shape, WIDTHS.get(bits, bits), group, ranges="scales_and_zeros", unit=unit)
