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

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales float32 `[G, N]`, zero points the same]."""
        codes = unpack_bits(tensors["qweight"], int(layer.weights.grid.bits), layer.shape[1])
        words = operand(layer, kind(codes.device)).shuffle.pack(codes + raised(layer))
        ranges = (by_row(tensors[name].float(), layer) for name in ("scale", "zero_point"))
        return [words, *(t.expand(layer.shape[0], -1).T.contiguous() for t in ranges)]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return pack_bits(codes_NK - raised(layer), int(layer.weights.grid.bits))


def raised(layer: Layer) -> int:
    """What is added to signed codes that take the room of wider ones, so that the middle one stays the middle."""
    grid = layer.weights.grid
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
    return (1 << WIDTHS.get(grid.bits, grid.bits) - 1) - (1 << grid.bits - 1) if grid.signed else 0


@cache
def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it on a machine."""
    grid, group = layer.weights.grid, layer.weights.block_size(layer.shape)[1]
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
    decode, unit = "signed_integers" if grid.signed else "integers", unit_for(target, group, layer.shape[1])
    return Weight(layer.shape, WIDTHS.get(grid.bits, grid.bits), group, decode, "scales_and_zeros", unit=unit)
