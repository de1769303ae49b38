"""The GPU kernel of `bnb-nf4/1` and `bnb-fp4/1` that needs no bitsandbytes: the main loop with their levels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._gemm.configs import kind
from hf_quant.kernels._gemm.kernel import MainLoop
from hf_quant.kernels._gemm.operand import Weight, unit_for
from hf_quant.kernels.bnb_4bit.scales import block_scales


@dataclass(frozen=True, slots=True)
class Triton(MainLoop):
    """`table[code] scale`; `levels` in the order of bitsandbytes' codes."""

    levels: tuple[float, ...]

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[shuffled words, scales float32 `[G, N]`, the table]; doubly quantized scales are decoded here."""
        qweight = tensors["qweight"]
        codes = torch.stack((qweight >> 4, qweight & 15), -1).flatten(1)
        table = torch.tensor(self.levels, device=qweight.device)
        return [operand(layer, kind(qweight.device)).shuffle.pack(codes), block_scales(tensors).T.contiguous(), table]

    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """See `MainLoop.weight`."""
        return operand(layer, kind(blob[0].device))

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `MainLoop.stored`."""
        return codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]


def operand(layer: Layer, target: str) -> Weight:
    """The layer's weight as the main loop sees it."""
    group = layer.weights.block_size(layer.shape)[1]
    return Weight(layer.shape, 4, group, "levels", unit=unit_for(target, group, layer.shape[1]))
