"""`float8/1`: weights in float8_e4m3fn or float8_e5m2, with scales for blocks of any shape; FP8 W8A8 and MXFP8."""

import torch
from torch import Tensor

from hf_quant.formats import Kernel, Layer, PackedFormat, Tensors
from hf_quant.grids import E4M3, E5M2
from hf_quant.kernels.float8.gpu import Canonical, Triton
from hf_quant.kernels.lut.cpu import TableCpu
from hf_quant.kernels.lut.native import Float8Native
from hf_quant.kernels.lut.scales import Layout, check_scales, pack_scales, refuses, scale_layout, unpack_scales
from hf_quant.qtensor import QTensor
from hf_quant.runtime import activation

TYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


class Float8(PackedFormat):
    """`y = q(x) (W_8 scale)^T`; the bytes are those of compressed-tensors' `float-quantized` (and `mxfp8-quantized`).

    Canonical tensors:
        qweight: float8_e4m3fn or float8_e5m2 `[N, K]`.
        scale: `[nb, kb]` in the type of `spec.scale`; powers of two as uint8, the exponent plus 127.
        tensor_scale: float32 `[1]`; only when the spec has one.
    """

    id = "float8/1"
    kernels: tuple[Kernel, ...] = (Float8Native(), TableCpu(), Canonical(), Triton())
    priority = 10  # lut-group could hold it as a table of 256

    def holds(self, layer: Layer) -> str | None:
        """The two types, blocks of any shape, float scales, no zero point."""
        if layer.weights.grid not in TYPES:
            return "weights need the values of float8_e4m3fn or float8_e5m2"
        if layer.weights.rotation is not None:
            return "rotated weights are not stored"
        return refuses(layer.weights) or activation.refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> Layout:
        """See the class."""
        return scale_layout(layer) | {"qweight": (layer.shape, _type(layer))}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """The codes are the bytes."""
        return pack_scales(q) | {"qweight": q.codes.contiguous().view(_type(Layer(q.shape, q.spec)))}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        scale, tensor_scale = unpack_scales(tensors, layer)
        codes = tensors["qweight"].view(torch.uint8)
        return QTensor(codes, scale, None, layer.weights, layer.shape, tensor_scale=tensor_scale)

    def rows(self, ids_T: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Decodes the rows asked for and nothing else."""
        if layer.weights.block[0] not in (1, -1):
            return super().rows(ids_T, tensors, layer)
        return self.unpack(tensors, layer).rows(ids_T).dequantize()

    def check(self, tensors: Tensors, layer: Layer) -> str | None:
        """Also: no NaN among the scales."""
        return super().check(tensors, layer) or check_scales(tensors)


def _type(layer: Layer) -> torch.dtype:
    return TYPES[layer.weights.grid]  # type: ignore[index]  # `holds` has looked it up


FORMATS = (Float8(),)
