"""Scales of the 4-bit formats of bitsandbytes, which may themselves be codes."""

from torch import Tensor

from hf_quant.formats import Tensors
from hf_quant.grids import DynamicGrid

NESTED_BLOCK = 256  # consecutive scales, in row order, that share a nested scale


def block_scales(tensors: Tensors) -> Tensor:
    """float32 `[N, G]`: `scale`, or `decode(scale) * nested_scale + nested_offset` when it holds codes."""
    scale = tensors["scale"]
    if "nested_scale" not in tensors:
        return scale.float()
    per_scale = tensors["nested_scale"].float().repeat_interleave(NESTED_BLOCK)[: scale.numel()].view_as(scale)
    return DynamicGrid().decode(scale) * per_scale + tensors["nested_offset"].float()
