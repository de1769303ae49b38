"""`int-float-zero/1`: integer codes of 1 to 8 bits as a bit stream, with scales and zero points of a float type."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, PackedFormat, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels.int_float_zero.gpu import Triton
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits, words
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import refuses


class IntFloatZero(PackedFormat):
    """`W = (code - zero) * scale`, where zero is any float: what is added to all values of a block is stored exactly.

    Canonical tensors, for b bits and scales `[nb, G]` (nb is N, or 1 for blocks over all rows):
        qweight: int32 `[N, ceil(K b / 32)]`, each row a bit stream of codes `0 .. 2^b-1` (value minus `grid.low`).
        scale: `[nb, G]` in the type of `spec.scale`.
        zero_point: float32 `[nb, G]`.
    """

    id = "int-float-zero/1"
    kernels = (Triton(),)

    def holds(self, layer: Layer) -> str | None:
        """Integer grids, blocks within one row or over all rows, float scales, float zero points."""
        spec = layer.weights
        if not isinstance(spec.grid, IntGrid):
            return f"weights need an integer grid, not {type(spec.grid).__name__}"
        if not isinstance(spec.scale, FloatGrid) or spec.scale.bits < 16 or spec.tensor_scale:
            return "scales need one float type of 16 or 32 bits"
        if spec.zero != "float":
            return "zero points are floats"
        if spec.index != "none" or spec.range != "static":
            return "weights have stored scales that depend on nothing but the block"
        if spec.block[0] not in (1, -1) and spec.block[0] < layer.shape[0]:
            return f"blocks of {spec.block[0]} rows: only 1 or all rows share a scale"
        return refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See the class."""
        grid, scale = _grids(layer)
        blocks = layer.weights.blocks(layer.shape)
        return {
            "qweight": ((layer.shape[0], words(layer.shape[1], grid.bits)), torch.int32),
            "scale": (blocks, scale.torch_dtype),
            "zero_point": (blocks, torch.float32),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """A bit stream of codes; scales in their stored type (exact: they lie on that grid)."""
        grid, scale = _grids(Layer(q.shape, q.spec))
        assert q.zero is not None  # noqa: S101  the spec has zero points
        return {
            "qweight": pack_bits(q.codes, grid.bits),
            "scale": scale.encode(q.scale).contiguous(),
            "zero_point": q.zero.float().contiguous(),
        }

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        grid, _ = _grids(layer)
        codes = unpack_bits(tensors["qweight"], grid.bits, layer.shape[1])
        return QTensor(codes, tensors["scale"].float(), tensors["zero_point"].float(), layer.weights, layer.shape)


def _grids(layer: Layer) -> tuple[IntGrid, FloatGrid]:
    grid, scale = layer.weights.grid, layer.weights.scale
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked both
    assert isinstance(scale, FloatGrid)  # noqa: S101
    return grid, scale


FORMATS = (IntFloatZero(),)
