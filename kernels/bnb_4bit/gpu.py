"""The GPU kernel of `bnb-nf4/1` and `bnb-fp4/1` that needs no bitsandbytes: the main loop with their levels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._gemm.configs import kind
from hf_quant.kernels._gemm.kernel import LowRank, TritonKernel
from hf_quant.kernels._gemm.operand import Weight, unit_for
from hf_quant.kernels.bnb_4bit.scales import block_scales


@dataclass(frozen=True, slots=True)
class Triton(TritonKernel):
    """`table[code] scale`; `levels` in the order of bitsandbytes' codes."""

    levels: tuple[float, ...]
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales float32 `[G, N]`, the table and 1]; doubly quantized scales are decoded here."""
        qweight = tensors["qweight"]
        codes = torch.stack((qweight >> 4, qweight & 15), -1).flatten(1)
        table = torch.tensor((*self.levels, 1.0), device=qweight.device)
        return [operand(layer, kind(qweight.device)).shuffle.pack(codes), block_scales(tensors).T.contiguous(), table]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        codes = operand(layer, kind(blob[0].device)).shuffle.unpack(blob[0], layer.shape)
        return {"qweight": codes[:, ::2] << 4 | codes[:, 1::2]}

    def product(
        self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, low_rank: LowRank | None
    ) -> Tensor:
        """See `TritonKernel.product`."""
        from hf_quant.kernels._gemm.launch import matmul

        return matmul(x_TK, blob, operand(layer, kind(x_TK.device)), x_TK.dtype, low_rank=low_rank)


def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it."""
    group = layer.weights.block_size(layer.shape)[1]
    return Weight(layer.shape, 4, group, "levels", unit=unit_for(target, group, layer.shape[1]))
