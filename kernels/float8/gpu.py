"""The GPU kernel of `float8/1`: 8-bit products of canonical bytes where the machine has them, decoding elsewhere."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import E4M3, E5M2
from hf_quant.kernels._gemm.configs import kind
from hf_quant.kernels._gemm.kernel import LowRank, TritonKernel, by_row, multiplies_float8, refuses_tokens
from hf_quant.kernels._gemm.operand import Weight, unit_for
from hf_quant.kernels.lut.scales import unpack_scales
from hf_quant.runtime.activation import fake_quantize

NARROWEST = 32  # columns of a block whose products are worth a tile of their own


@dataclass(frozen=True, slots=True)
class Triton(TritonKernel):
    """W8A8 as it is stored, and float8 weights for 16-bit inputs by the main loop."""

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[scales `[kb, N]`] for 8-bit products, else [shuffled words, scales `[kb, N]`, the tensor's scale or the
        table with it].
        """
        scale, whole = unpack_scales(tensors, layer)
        whole = scale.new_ones(1) if whole is None else whole.reshape(1)
        scale = by_row(scale, layer).expand(layer.shape[0], -1)
        if eight_bits(layer, scale.device):
            return [(scale * whole).T.contiguous()]
        weight, codes = operand(layer, kind(scale.device)), tensors["qweight"].view(torch.uint8)
        table = torch.cat((E5M2.table().flatten().to(scale.device), whole)) if weight.decode == "levels" else whole
        return [weight.shuffle.pack(codes), scale.T.contiguous(), table]

    def product(
        self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, low_rank: LowRank | None
    ) -> Tensor:
        """See `TritonKernel.product`."""
        from hf_quant.kernels._gemm.launch import matmul
        from hf_quant.kernels._gemm.quantized import quantize, scaled_matmul, static_range

        if len(blob) > 1:
            return matmul(
                fake_quantize(x_TK, layer.inputs, tensors),
                blob,
                operand(layer, kind(x_TK.device)),
                x_TK.dtype,
                low_rank=low_rank,
            )
        assert layer.inputs is not None  # noqa: S101  `eight_bits`
        x, block = quantize(x_TK, layer.inputs, static_range(tensors)), layer.weights.block_size(layer.shape)[1]
        return scaled_matmul(x, tensors["qweight"], blob[0], block, x_TK.dtype, low_rank=low_rank)


def eight_bits(layer: Layer, device: torch.device) -> bool:
    """Whether the product is one of 8-bit floats: both sides E4M3, blocks that tiles divide, a machine that has it."""
    inputs, block = layer.inputs, layer.weights.block_size(layer.shape)[1]
    if inputs is None or inputs.grid != E4M3 or layer.weights.grid != E4M3 or refuses_tokens(inputs) is not None:
        return False
    return multiplies_float8(device) and (block >= layer.shape[1] or block % NARROWEST == 0)


@cache
def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it."""
    decode = "float8_e4m3" if layer.weights.grid == E4M3 else "levels"
    group = layer.weights.block_size(layer.shape)[1]
    return Weight(layer.shape, 8, group, decode, unit=unit_for(target, group, layer.shape[1]))
