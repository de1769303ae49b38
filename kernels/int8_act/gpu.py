"""The GPU kernel of `int8-act/1`: tokens quantized in one pass, integers times integers from the canonical bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._gemm.kernel import LowRank, TritonKernel, refuses_tokens
from hf_quant.kernels.int8_act.cpu import LONGEST_SUM


@dataclass(frozen=True, slots=True)
class Triton(TritonKernel):
    """Exact in int32 until the scales."""

    def takes(self, layer: Layer) -> str | None:
        """Rows whose sums an int32 holds, tokens of one scale."""
        if layer.shape[1] > LONGEST_SUM:
            return f"sums of more than {LONGEST_SUM} products can overflow, and there are {layer.shape[1]} inputs"
        assert layer.inputs is not None  # noqa: S101  the format holds no others
        return refuses_tokens(layer.inputs)

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[scales float32 `[1, N]`, and sums of the dequantized rows `[N]` when inputs have a zero point]."""
        assert layer.inputs is not None  # noqa: S101
        scale = tensors["scale"].float().T.contiguous()
        if layer.inputs.zero == "none":
            return [scale]
        return [scale, tensors["qweight"].sum(1, dtype=torch.int32).float() * scale[0]]

    def product(
        self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, low_rank: LowRank | None
    ) -> Tensor:
        """See `TritonKernel.product`."""
        from hf_quant.kernels._gemm.quantized import quantize, scaled_matmul, static_range

        assert layer.inputs is not None  # noqa: S101
        x, sums = quantize(x_TK, layer.inputs, static_range(tensors)), blob[1] if len(blob) > 1 else None
        return scaled_matmul(
            x, tensors["qweight"], blob[0], layer.shape[1], x_TK.dtype, low_rank=low_rank, row_sums=sums
        )
