"""Canonical tensors of `lut-group/1` -> codes and scales."""

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import TableGrid
from hf_quant.kernels.int_group.bitstream import unpack_bits
from hf_quant.kernels.lut.scales import unpack_scales
from hf_quant.qtensor import QTensor


def table_grid(layer: Layer) -> TableGrid:
    """The weights' grid."""
    grid = layer.weights.grid
    assert isinstance(grid, TableGrid)  # noqa: S101  `holds` has checked it
    return grid


def unpack(tensors: Tensors, layer: Layer) -> QTensor:
    """Inverse of `LutGroup.pack`."""
    grid = table_grid(layer)
    codes = unpack_bits(tensors["qweight"], grid.code_bits, layer.shape[1] // grid.vector)
    scale, tensor_scale = unpack_scales(tensors, layer)
    return QTensor(codes, scale, None, layer.weights, layer.shape, tensor_scale=tensor_scale)
