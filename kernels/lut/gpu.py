"""The GPU kernels of `lut-group/1` and `codebook-group/1`: tables, and small floats decoded by arithmetic."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import CodebookGrid, FloatGrid, Grid, MiniFloatGrid, TableGrid
from hf_quant.kernels._gemm.configs import kind
from hf_quant.kernels._gemm.kernel import MainLoop, by_row
from hf_quant.kernels._gemm.operand import TABLES, RangesOf, Weight, byte_ranges, table_of, unit_for
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits
from hf_quant.kernels.lut.scales import unpack_scales

WIDTHS = {5: 6, 7: 8}  # bits that take the room of the next ones in memory
E2M1 = MiniFloatGrid(2, 1)
BYTES: dict[Grid, RangesOf] = {FloatGrid("float8_e8m0fnu"): "powers", FloatGrid("float8_e4m3fn"): "small_floats"}


@dataclass(frozen=True, slots=True)
class Triton(MainLoop):
    """The main loop with a table of levels; MXFP4 and NVFP4 with E2M1 decoded on bits and scales that stay bytes."""

    def takes(self, layer: Layer) -> str | None:
        """Codes of one value."""
        vector = layer.weights.grid.vector
        return None if vector == 1 else f"codes of {vector} values are not decoded here"

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales `[G, N]` or their bytes, table and the tensor's scale]."""
        weight, grid = table_operand(layer, kind(tensors["qweight"].device)), layer.weights.grid
        assert isinstance(grid, TableGrid)  # noqa: S101  `holds` has checked it
        words = weight.shuffle.pack(unpack_bits(tensors["qweight"], grid.code_bits, layer.shape[1]))
        scale, whole = unpack_scales(tensors, layer)
        whole = scale.new_ones(1) if whole is None else whole.reshape(1)
        if weight.ranges == "scales":
            ranges = by_row(scale, layer).expand(layer.shape[0], -1).T.contiguous()
        else:
            ranges = byte_ranges(by_row(tensors["scale"].view(torch.uint8), layer), layer.shape[0])
        if weight.decode not in TABLES:
            return [words, ranges, whole]
        return [words, ranges, table_of(grid.table().flatten().to(scale.device), weight, whole)]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return table_operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        assert isinstance(layer.weights.grid, TableGrid)  # noqa: S101  `holds` has checked it
        return pack_bits(codes_NK, layer.weights.grid.code_bits)


@dataclass(frozen=True, slots=True)
class CodebookTriton(MainLoop):
    """The main loop with a codebook a block."""

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, number of each block's codebook int32 `[G, N]`, the codebooks]."""
        grid, weight = layer.weights.grid, codebook_operand(layer, kind(tensors["qweight"].device))
        assert isinstance(grid, CodebookGrid)  # noqa: S101  `holds` has checked it
        words = weight.shuffle.pack(unpack_bits(tensors["qweight"], grid.bits, layer.shape[1]))
        nb, kb = layer.weights.blocks(layer.shape)
        number = torch.arange(nb * kb, device=words.device, dtype=torch.int32).view(nb, kb)
        books = F.pad(tensors["codebook"].float().view(nb * kb, -1), (0, (1 << weight.bits) - (1 << grid.bits)))
        return [words, by_row(number, layer).expand(layer.shape[0], -1).T.contiguous(), books.contiguous()]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return codebook_operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return pack_bits(codes_NK, int(layer.weights.grid.bits))


@cache
def table_operand(layer: Layer, target: str) -> Weight:
    """A weight of table codes as the main loop sees it."""
    grid, group = layer.weights.grid, layer.weights.block_size(layer.shape)[1]
    unit = unit_for(target, group, layer.shape[1])
    assert isinstance(grid, TableGrid)  # noqa: S101  `holds` has checked it
    if grid != E2M1:
        decode = "scaled_levels" if layer.weights.tensor_scale else "levels"
        return Weight(layer.shape, WIDTHS.get(grid.code_bits, grid.code_bits), group, decode, unit=unit)
    ranges: RangesOf = BYTES.get(layer.weights.scale, "scales")
    decode = "mxfp4" if ranges == "powers" and not layer.weights.tensor_scale else "float4"
    return Weight(layer.shape, 4, group, decode, ranges, unit=unit)


@cache
def codebook_operand(layer: Layer, target: str) -> Weight:
    """A weight of codebooks as the main loop sees it."""
    grid, group = layer.weights.grid, layer.weights.block_size(layer.shape)[1]
    unit = unit_for(target, group, layer.shape[1])
    assert isinstance(grid, CodebookGrid)  # noqa: S101  `holds` has checked it
    return Weight(layer.shape, WIDTHS.get(grid.bits, grid.bits), group, "codebooks", unit=unit)
