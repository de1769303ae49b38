"""The GPU kernel as the format sees it; Triton itself is imported when it first runs."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels.int_group.reference import zero_codes
from hf_quant.runtime.activation import fake_quantize


@dataclass(frozen=True, slots=True)
class Triton:
    """`int_group.triton`, for every layer of the format."""

    name: ClassVar[str] = "triton"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if device.type != "cuda":
            return f"runs on cuda, not {device.type}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 and bfloat16, not {dtype}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available():
            return "no GPU is available here"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0 or newer"
        return None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[zero points, one byte each] when there are any: they are few, and packed across rows."""
        zeros = zero_codes(tensors, layer)
        return [] if zeros is None else [zeros.contiguous()]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        from hf_quant.kernels.int_group.triton import matmul

        return matmul(fake_quantize(x_TK, layer.inputs, tensors), tensors, blob[0] if blob else None, layer)
