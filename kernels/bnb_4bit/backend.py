"""The kernel that calls bitsandbytes: its fused products on GPU, its fast dequantization on CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels.bnb_4bit.installed import why_not
from hf_quant.kernels.bnb_4bit.scales import block_scales


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """`bitsandbytes.matmul_4bit`; `quant_type` is its name for the levels."""

    quant_type: str
    name: str = "bitsandbytes"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if device.type not in ("cpu", "cuda"):
            return f"runs on cpu and cuda, not {device.type}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 and bfloat16, not {dtype}"
        return why_not()

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[scales in float32, the table of levels]; doubly quantized scales are decoded once, here."""
        from bitsandbytes.functional import get_4bit_type

        return [block_scales(tensors).flatten(), get_4bit_type(self.quant_type, device=tensors["scale"].device)]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        scale, levels = blob
        state = QuantState(
            absmax=scale,
            shape=torch.Size(layer.shape),
            code=levels,
            blocksize=layer.weights.block[1],
            quant_type=self.quant_type,
            dtype=x_TK.dtype,
        )
        y_TN: Tensor = bitsandbytes.matmul_4bit(x_TK, tensors["qweight"].view(-1, 1).t(), state)
        return y_TN
