"""`int-group/1`: integer codes of 1 to 8 bits as a bit stream, with scales and packed integer zero points."""

import torch
from torch import Tensor

from hf_quant.formats import Kernel, Layer, PackedFormat, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels.int_group.bitstream import pack_bits, take_bits, unpack_bits, words
from hf_quant.kernels.int_group.cpu import Int4Cpu, Int8Cpu
from hf_quant.kernels.int_group.gpu import Triton
from hf_quant.kernels.int_group.native import Native
from hf_quant.kernels.int_group.reference import dequantize, zero_codes
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import refuses


class IntGroup(PackedFormat):
    """`W = (code - zero) * scale`; the bytes are those of compressed-tensors' `pack-quantized`.

    Canonical tensors, for b bits and scales `[nb, G]` (nb is N, or 1 for blocks over all rows):
        qweight: int32 `[N, ceil(K b / 32)]`, each row a bit stream of codes `0 .. 2^b-1` (value minus `grid.low`).
        scale: `[nb, G]` in the type of `spec.scale`.
        zero_point: int32 `[ceil(nb b / 32), G]`, codes like the weight's, a stream along dim 0; only with zero "int".
    """

    id = "int-group/1"
    kernels: tuple[Kernel, ...] = (Native(), Int4Cpu(), Int8Cpu(), Triton())

    def holds(self, layer: Layer) -> str | None:
        """Integer grids, blocks within one row or over all rows, float scales, zero none or int."""
        spec = layer.weights
        if not isinstance(spec.grid, IntGrid):
            return f"weights need an integer grid, not {type(spec.grid).__name__}"
        if not isinstance(spec.scale, FloatGrid):
            return f"scales need a float type, not {type(spec.scale).__name__}"
        if spec.zero == "float":
            return "float zero points are not stored"
        if spec.index != "none" or spec.range != "static" or spec.outer:
            return "weights have stored scales that depend on nothing but the block"
        if spec.block[0] not in (1, -1) and spec.block[0] < layer.shape[0]:
            return f"blocks of {spec.block[0]} rows: only 1 or all rows share a scale"
        return refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See the class."""
        grid, scale = _grids(layer)
        rows, groups = layer.weights.blocks(layer.shape)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((layer.shape[0], words(layer.shape[1], grid.bits)), torch.int32),
            "scale": ((rows, groups), scale.torch_dtype),
        }
        if layer.weights.zero == "int":
            layout["zero_point"] = ((words(rows, grid.bits), groups), torch.int32)
        return layout

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Bit streams of codes and zero points; scales in their stored type (exact: they lie on that grid)."""
        grid, scale = _grids(Layer(q.shape, q.spec))
        tensors = {"qweight": pack_bits(q.codes, grid.bits), "scale": scale.encode(q.scale).contiguous()}
        if q.zero is not None:
            tensors["zero_point"] = pack_bits(grid.encode(q.zero).T, grid.bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        grid, _ = _grids(layer)
        codes = unpack_bits(tensors["qweight"], grid.bits, layer.shape[1])
        zero = zero_codes(tensors, layer)
        zero = None if zero is None else grid.decode(zero)
        return QTensor(codes, tensors["scale"].float(), zero, layer.weights, layer.shape)

    def weight(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> Tensor:
        """See `PackedFormat.weight`."""
        return dequantize(tensors, layer, dtype)

    def rows(self, ids_T: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Unpacks the rows asked for and nothing else."""
        grid, _ = _grids(layer)
        codes = unpack_bits(tensors["qweight"][ids_T], grid.bits, layer.shape[1])
        per_row = layer.weights.blocks(layer.shape)[0] == layer.shape[0]
        zero = None
        if layer.weights.zero == "int":
            index = ids_T if per_row else torch.zeros_like(ids_T[:1])
            zero = grid.decode(take_bits(tensors["zero_point"].T, grid.bits, index).T)
        scale = tensors["scale"][ids_T] if per_row else tensors["scale"]
        return QTensor(codes, scale.float(), zero, layer.weights, (len(ids_T), layer.shape[1])).dequantize()


def _grids(layer: Layer) -> tuple[IntGrid, FloatGrid]:
    grid, scale = layer.weights.grid, layer.weights.scale
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked both
    assert isinstance(scale, FloatGrid)  # noqa: S101
    return grid, scale


FORMATS = (IntGroup(),)
