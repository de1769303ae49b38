"""The GPU kernel of `int8-act/1`: tokens quantized in one pass, integers times integers from the canonical bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import ALONE, Around, Layer, Tensors
from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.kernel import ALL, TritonKernel, in_one_pass, refuses_tokens
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
        """[canonical bytes, scales float32 `[1, N]`, and sums of the dequantized rows `[N]` when inputs have a zero
        point].
        """
        assert layer.inputs is not None  # noqa: S101
        codes, scale = tensors["qweight"], tensors["scale"].float().T.contiguous()
        if layer.inputs.zero == "none":
            return [codes, scale]
        return [codes, scale, codes.sum(1, dtype=torch.int32).float() * scale[0]]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        return {"qweight": blob[0].clone()}

    def dense(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Tensor:
        """See `Grouping.dense`."""
        return (blob[0].float() * blob[1].T).to(dtype)

    def config(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: int) -> Config:
        """See `TritonKernel.config`."""
        from hf_quant.kernels._gemm.quantized import eight_bit, tile_of_k

        return eight_bit(tokens, *layer.shape, tile_of_k(layer.shape[1], layer.shape[1]))

    def fuses(self, layer: Layer) -> frozenset[str]:
        """See `Fusing.fuses`."""
        return ALL

    def product(
        self,
        x_TK: Tensor,
        tensors: Tensors,
        blob: list[Tensor],
        layer: Layer,
        around: Around = ALONE,
        experts: Tensor | None = None,
    ) -> Tensor:
        """See `TritonKernel.product`."""
        from hf_quant.kernels._gemm.quantized import scaled_matmul

        assert layer.inputs is not None  # noqa: S101
        x, (codes, scale, *sums) = in_one_pass(x_TK, layer.inputs, tensors, around), blob
        return scaled_matmul(
            x,
            codes,
            scale,
            layer.shape[1],
            x_TK.dtype,
            low_rank=around.low_rank,
            row_sums=sums[0] if sums else None,
            experts=experts,
        )
