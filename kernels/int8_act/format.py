"""`int8-act/1`: int8 weights with one scale a row, for layers whose input is quantized to integers as well."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, PackedFormat, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels.int8_act.cpu import Int8Mm
from hf_quant.kernels.int8_act.gpu import Triton
from hf_quant.kernels.int8_act.native import Native
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import refuses, timed

GRID = IntGrid(8, signed=True)


class Int8Act(PackedFormat):
    """`y = (x_int - x_zero) x_scale  (W_int scale)^T`; the bytes are those of compressed-tensors' `int-quantized`.

    Canonical tensors, besides the static input's (`runtime.activation.input_layout`):
        qweight: int8 `[N, K]`, the signed values.
        scale: `[N, 1]` in the type of `spec.scale`.
    """

    id = "int8-act/1"
    priority = 10  # what it holds, it runs faster than int-group
    kernels = (Native(), Int8Mm(), Triton())

    def holds(self, layer: Layer) -> str | None:
        """Symmetric 8-bit rows, with integer inputs of one scale a token (dynamic) or one in all (static)."""
        spec, inputs = layer.weights, layer.inputs
        if spec.grid != GRID or spec.zero != "none":
            return "weights need symmetric 8-bit integers"
        if spec.block_size(layer.shape) != (1, layer.shape[1]):
            return f"weights need one scale for each row, not blocks of {spec.block}"
        if not isinstance(spec.scale, FloatGrid):
            return f"scales need a float type, not {type(spec.scale).__name__}"
        if spec.index != "none" or spec.range != "static" or spec.outer:
            return "weights have stored scales that depend on nothing but the row"
        if inputs is None:
            return "inputs are not quantized"
        if timed(inputs):
            return "inputs need one range for all timesteps"
        if inputs.power != 1:
            return "inputs need one scale for each token, not scales for columns as well"
        if not isinstance(inputs.grid, IntGrid):
            return f"inputs need an integer grid, not {type(inputs.grid).__name__}"
        if inputs.block[1] != -1 and inputs.block[1] < layer.shape[1]:
            return f"inputs need one scale for each token, not groups of {inputs.block[1]}"
        return refuses(inputs)

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See the class."""
        N, scale = layer.shape[0], layer.weights.scale
        assert isinstance(scale, FloatGrid)  # noqa: S101  `holds` has checked it
        return {"qweight": (layer.shape, torch.int8), "scale": ((N, 1), scale.torch_dtype)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Codes as signed values (they differ in the top bit); scales in their stored type."""
        return {"qweight": (q.codes ^ 0x80).view(torch.int8), "scale": q.spec.scale.encode(q.scale)}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        codes = tensors["qweight"].view(torch.uint8) ^ 0x80
        return QTensor(codes, tensors["scale"].float(), None, layer.weights, layer.shape)


FORMATS = (Int8Act(),)
