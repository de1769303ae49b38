"""The weights of `int-group/1` as a matrix, fast enough to be the path that serves everything without a kernel."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels.int_group.bitstream import unpack_bits
from hf_quant.qtensor import expand

SLICE = 1 << 19  # weights dequantized at once on CPU


def zero_codes(tensors: Tensors, layer: Layer) -> Tensor | None:
    """Zero points as codes, uint8 `[nb, G]`, or None when the layer has none."""
    if layer.weights.zero == "none":
        return None
    return unpack_bits(tensors["zero_point"].T, int(layer.weights.grid.bits), layer.weights.blocks(layer.shape)[0]).T


def dequantize(tensors: Tensors, layer: Layer, dtype: torch.dtype) -> Tensor:
    """`W_NK`, the same bits as `QTensor.dequantize`.

    On CPU a slice of rows at a time: 8x faster than whole float32 matrices, which are fresh pages each, and without
    their memory.
    """
    (N, K), spec, grid = layer.shape, layer.weights, layer.weights.grid
    assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
    W_NK = torch.empty(N, K, dtype=dtype, device=tensors["qweight"].device)
    step = max(1, SLICE // K) if W_NK.device.type == "cpu" else N
    scale, zero = tensors["scale"].float(), zero_codes(tensors, layer)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        values = unpack_bits(tensors["qweight"][rows], grid.bits, K).float()
        shape = (values.shape[0], K)
        # code minus zero's code is value minus zero: the grid's offset cancels
        offset = -grid.low if zero is None else expand(_rows(zero, rows), spec, shape)
        W_NK[rows] = values.sub_(offset).mul_(expand(_rows(scale, rows), spec, shape))
    return W_NK


def _rows(blocks: Tensor, rows: slice) -> Tensor:
    return blocks[rows] if blocks.shape[0] > 1 else blocks
