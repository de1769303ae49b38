"""Scales of one block and of the whole tensor as they are stored; shared by the formats of floats and tables."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import FloatGrid
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def refuses(spec: Spec) -> str | None:
    """None when scales are stored as here, else the reason why not."""
    if not isinstance(spec.scale, FloatGrid):
        return f"scales need a float type, not {type(spec.scale).__name__}"
    if spec.zero != "none":
        return "there are no zero points"
    if spec.index != "none" or spec.range != "static":
        return "weights have stored scales that depend on nothing but the block"
    return None


def scale_type(spec: Spec) -> torch.dtype:
    """The type of stored scales; powers of two (E8M0) are the bytes of their exponents plus 127."""
    assert isinstance(spec.scale, FloatGrid)  # noqa: S101  `refuses` has checked it
    dtype = spec.scale.torch_dtype
    return torch.uint8 if dtype == torch.float8_e8m0fnu else dtype


def scale_layout(layer: Layer) -> Layout:
    """`tensor_scale` float32 `[1]` where the spec has one, `scale` `[nb, kb]`."""
    tensor: Layout = {"tensor_scale": ((1,), torch.float32)} if layer.weights.tensor_scale else {}
    return tensor | {"scale": (layer.weights.blocks(layer.shape), scale_type(layer.weights))}


def pack_scales(q: QTensor) -> dict[str, Tensor]:
    """What `scale_layout` lists (exact: scales lie on their grid)."""
    scale, dtype = q.spec.scale.encode(q.scale).contiguous(), scale_type(q.spec)
    tensors = {"scale": scale.view(dtype) if dtype == torch.uint8 else scale}
    return tensors if q.tensor_scale is None else tensors | {"tensor_scale": q.tensor_scale.float()}


def unpack_scales(tensors: Tensors, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """(scale, tensor scale or None) in float32."""
    scale = tensors["scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float(), tensors["tensor_scale"].float() if layer.weights.tensor_scale else None


def check_scales(tensors: Tensors) -> str | None:
    """E8M0 has one NaN, the byte 255."""
    scale = tensors["scale"]
    return "scale holds NaN" if scale.dtype == torch.uint8 and bool((scale == 255).any()) else None
