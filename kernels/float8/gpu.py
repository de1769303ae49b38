"""The GPU kernels of `float8/1`: 8-bit products of canonical bytes where the machine has them, decoding elsewhere."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import ALONE, Around, Layer, Tensors
from hf_quant.grids import E4M3, E5M2
from hf_quant.kernels._gemm.configs import Config, kind
from hf_quant.kernels._gemm.kernel import (
    ALL,
    MainLoop,
    TritonKernel,
    by_row,
    in_one_pass,
    refuses_tokens,
)
from hf_quant.kernels._gemm.machine import multiplies_float8
from hf_quant.kernels._gemm.operand import Weight, table_of, unit_for
from hf_quant.kernels.lut.scales import unpack_scales

NARROWEST = 32  # columns of a block whose products are worth a tile of their own


@dataclass(frozen=True, slots=True)
class Canonical(TritonKernel):
    """W8A8 of the bytes as they are stored, where tensor cores take them."""

    name: ClassVar[str] = "triton-float8"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if (reason := TritonKernel.supports(self, layer, device, dtype)) is not None:
            return reason
        return None if multiplies_float8(device) else "tensor cores take no float8_e4m3fn here"

    def takes(self, layer: Layer) -> str | None:
        """Both sides E4M3, blocks that tiles divide."""
        if layer.inputs is None or layer.inputs.grid != E4M3 or layer.weights.grid != E4M3:
            return "inputs and weights become float8_e4m3fn"
        block = layer.weights.block_size(layer.shape)[1]
        if block < layer.shape[1] and block % NARROWEST:
            return f"blocks of a multiple of {NARROWEST} columns, not of {block}"
        return refuses_tokens(layer.inputs)

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[canonical bytes, scales `[kb, N]`]."""
        scale, whole = scales(tensors, layer)
        return [tensors["qweight"], (scale * whole).T.contiguous()]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        return {"qweight": blob[0].clone()}

    def dense(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Tensor:
        """See `Grouping.dense`."""
        columns = layer.weights.block_size(layer.shape)[1]
        scale = blob[1].T.repeat_interleave(columns, 1)[:, : layer.shape[1]]
        return (blob[0].float() * scale).to(dtype)

    def config(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: int) -> Config:
        """See `TritonKernel.config`."""
        from hf_quant.kernels._gemm.quantized import eight_bit, tile_of_k, vendor_multiplies

        block = layer.weights.block_size(layer.shape)[1]
        if vendor_multiplies(blob[0], block, dtype, tokens):
            return Config("vendor")
        return eight_bit(tokens, *layer.shape, tile_of_k(block, layer.shape[1]))

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

        assert layer.inputs is not None  # noqa: S101  `takes` has looked at it
        x, block = in_one_pass(x_TK, layer.inputs, tensors, around), layer.weights.block_size(layer.shape)[1]
        codes, scale = blob
        return scaled_matmul(x, codes, scale, block, x_TK.dtype, low_rank=around.low_rank, experts=experts)


@dataclass(frozen=True, slots=True)
class Triton(MainLoop):
    """Float8 weights for 16-bit inputs by the main loop."""

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales `[kb, N]`, the tensor's scale or the table with it]."""
        scale, whole = scales(tensors, layer)
        weight, codes = operand(layer, kind(scale.device)), tensors["qweight"].view(torch.uint8)
        if weight.decode == "scaled_levels":
            whole = table_of(E5M2.table().flatten().to(scale.device), weight, whole)
        return [weight.shuffle.pack(codes), scale.T.contiguous(), whole]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return codes_NK.view(torch.float8_e4m3fn if layer.weights.grid == E4M3 else torch.float8_e5m2)


def scales(tensors: Tensors, layer: Layer) -> tuple[Tensor, Tensor]:
    """(scales `[N, kb]`, the tensor's scale `[1]`), float32."""
    scale, whole = unpack_scales(tensors, layer)
    whole = scale.new_ones(1) if whole is None else whole.reshape(1)
    return by_row(scale, layer).expand(layer.shape[0], -1), whole


@cache
def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it."""
    decode = "float8_e4m3" if layer.weights.grid == E4M3 else "scaled_levels"
    group = layer.weights.block_size(layer.shape)[1]
    return Weight(layer.shape, 8, group, decode, unit=unit_for(target, group, layer.shape[1]))
