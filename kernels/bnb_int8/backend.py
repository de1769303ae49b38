"""The kernel that calls bitsandbytes: int8 products, and full precision for the columns of large inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels.bnb_4bit.installed import why_not

THRESHOLD = 6.0  # of the paper, and bitsandbytes' default


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """`bitsandbytes::int8_vectorwise_quant`, then `int8_mixed_scaled_mm`."""

    name: ClassVar[str] = "bitsandbytes"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if device.type not in ("cpu", "cuda"):
            return f"runs on cpu and cuda, not {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):  # its 1 / 127^2 is off by 2e-5 on some backends
            return f"exact enough for float16 and bfloat16, not for {dtype}"
        return why_not()

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[row maximum, float32 `[N]`]."""
        return [tensors["scale"].float().flatten() * 127]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        if x_TK.shape[0] == 0:
            return x_TK.new_empty(0, layer.shape[0])
        ops = torch.ops.bitsandbytes
        x_TK = x_TK.contiguous()
        x_int, top, columns = ops.int8_vectorwise_quant(x_TK.half(), THRESHOLD)
        y_TN: Tensor = ops.int8_mixed_scaled_mm(x_TK, x_int, tensors["qweight"], top, blob[0], columns)[0]
        return y_TN
