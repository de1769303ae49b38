"""The GPU kernel of `int-group/1`: its codes and scales as an operand of the main loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_quant.formats import ALONE, Around, Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels._gemm.configs import Config, bucket, choose, kind
from hf_quant.kernels._gemm.kernel import ALL, MainLoop, in_one_pass, refuses_tokens
from hf_quant.kernels._gemm.operand import BLOCK, WHOLE_ROW, RangesOf, Weight, affine_ranges, ranges_of, unit_for
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits
from hf_quant.kernels.int_group.reference import dequantize, zero_codes

MANY = 128  # tokens from which on integers are written out as bytes and multiplied as such
WIDTHS = {5: 6, 7: 8}  # bits that take the room of the next ones in memory


@dataclass(frozen=True, slots=True)
class Triton(MainLoop):
    """The main loop of `kernels/_gemm`, for every layer of the format.

    Where inputs are integers and blocks of scales allow it, integers are multiplied; else inputs are rounded and
    multiplied as numbers.
    """

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales (with zero points where both fit a word), zero points where not; sums of the rows
        where integer inputs have zero points].
        """
        codes = unpack_bits(tensors["qweight"], int(layer.weights.grid.bits), layer.shape[1])
        integers = as_integers(layer)
        words = operand(layer, "scales", kind(codes.device), integers=integers).shuffle.pack(codes)
        zeros = zero_codes(tensors, layer)
        scale, kept, zero = tensors["scale"], torch.float32 if integers else dtype, -grid_of(layer).low
        blob = [words, *affine_ranges(scale, zeros, layer.shape[0], kept, zero=zero)]
        if integers and layer.inputs is not None and layer.inputs.zero == "int":
            blob.append(dequantize(tensors, layer, torch.float32).sum(1))
        return blob

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        integers = as_integers(layer)
        return operand(layer, ranges_of(without_sums(blob, layer)), kind(blob[0].device), integers=integers)

    def config(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: int) -> Config:
        """See `MainLoop.config`."""
        if not as_integers(layer):
            return MainLoop.config(self, blob, layer, dtype, tokens)
        from hf_quant.kernels._gemm.launch import only_tensor
        from hf_quant.kernels._gemm.quantized import eight_bit, tile_of_k

        if tokens > MANY:
            return eight_bit(tokens, *layer.shape, tile_of_k(layer.weights.block_size(layer.shape)[1], layer.shape[1]))
        weight, values = self.weight(blob, layer), blob[0].new_empty(0, dtype=torch.int8)
        return only_tensor(choose(weight, values.dtype, bucket(tokens), values.device), weight, values)

    def tunings(
        self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: Sequence[int]
    ) -> dict[str, Callable[[], str]]:
        """See `MainLoop.tunings`; products of integers are not tuned."""
        return {} if as_integers(layer) else MainLoop.tunings(self, blob, layer, dtype, tokens)

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return pack_bits(codes_NK, int(layer.weights.grid.bits))

    def fuses(self, layer: Layer) -> frozenset[str]:
        """See `Fusing.fuses`."""
        return ALL if as_integers(layer) else MainLoop.fuses(self, layer)

    def product(
        self,
        x_TK: Tensor,
        tensors: Tensors,
        blob: list[Tensor],
        layer: Layer,
        around: Around = ALONE,
        experts: Tensor | None = None,
    ) -> Tensor:
        """See `MainLoop.product`."""
        from hf_quant.kernels._gemm.launch import matmul
        from hf_quant.kernels._gemm.quantized import unpacked_matmul

        if not as_integers(layer):
            return MainLoop.product(self, x_TK, tensors, blob, layer, around, experts)
        assert layer.inputs is not None  # noqa: S101  `as_integers`
        sums, weight = blob[-1] if layer.inputs.zero == "int" else None, self.weight(blob, layer)
        x, blob = in_one_pass(x_TK, layer.inputs, tensors, around), without_sums(blob, layer)
        if experts is None and len(x_TK) > MANY:
            return unpacked_matmul(x, blob, weight, x_TK.dtype, row_sums=sums, low_rank=around.low_rank)
        return matmul(x, blob, weight, x_TK.dtype, low_rank=around.low_rank, row_sums=sums, experts=experts)


def without_sums(blob: list[Tensor], layer: Layer) -> list[Tensor]:
    """The blob as the loop takes it."""
    shifted = as_integers(layer) and layer.inputs is not None and layer.inputs.zero == "int"
    return blob[:-1] if shifted else blob


def as_integers(layer: Layer) -> bool:
    """Whether the layer's product is one of integers: their differences fit a byte, scales do not part a block."""
    if layer.inputs is None or not isinstance(layer.inputs.grid, IntGrid):
        return False
    if refuses_tokens(layer.inputs) is not None:
        return False
    fits = layer.weights.grid.bits < 8 or layer.weights.zero == "none"
    return fits and operand(layer, "scales", "", integers=True).span in (WHOLE_ROW, BLOCK)


@cache
def operand(layer: Layer, ranges: RangesOf, target: str, *, integers: bool = False) -> Weight:
    """The layer's weight as the main loop sees it on a machine."""
    grid = grid_of(layer)
    bits, group = WIDTHS.get(grid.bits, grid.bits), layer.weights.block_size(layer.shape)[1]
    unit = 4 if integers else unit_for(target, group, layer.shape[1])
    zero = -grid.low if layer.weights.zero == "none" else None
    return Weight(layer.shape, bits, group, ranges=ranges, zero=zero, unit=unit)


def grid_of(layer: Layer) -> IntGrid:
    """The grid of the layer's codes."""
    grid = layer.weights.grid
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
    return grid
