"""The GPU kernel of `bnb-int8/1` without bitsandbytes: 8-bit products, columns of large inputs as their branch."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._gemm import machine
from hf_quant.kernels._gemm.configs import BUCKETS
from hf_quant.kernels._gemm.kernel import told
from hf_quant.kernels.bnb_int8.backend import THRESHOLD
from hf_quant.kernels.int8_act.cpu import LONGEST_SUM


@dataclass(frozen=True, slots=True)
class Triton:
    """`y = x_int W_int^T + x[:, large] W[:, large]^T`, written once.

    Which columns are large is read back from the GPU, as bitsandbytes does: not for CUDA graphs.
    """

    name: ClassVar[str] = "triton"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        return machine.refuses(device, dtype) or self.takes(layer)

    def takes(self, layer: Layer) -> str | None:
        """Rows whose sums an int32 holds."""
        if layer.shape[1] <= LONGEST_SUM:
            return None
        return f"sums of more than {LONGEST_SUM} products can overflow, and there are {layer.shape[1]} inputs"

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[scales float32 `[1, N]`]."""
        return [tensors["scale"].float().T.contiguous()]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        from hf_quant.kernels._gemm.quantized import Range, quantize, scaled_matmul

        if len(x_TK) == 0:
            return x_TK.new_empty(0, layer.shape[0])
        assert layer.inputs is not None  # noqa: S101  the format holds no others
        half = x_TK.half()
        large_TK = half.abs() >= THRESHOLD
        small = half.masked_fill(large_TK, 0).float()
        step_T = small.abs().amax(1) / 127
        step_T = torch.where(step_T > 0, step_T, 1)
        tokens = quantize(small, layer.inputs, Range(step_T, index=torch.arange(len(x_TK), device=x_TK.device)))
        large_K = large_TK.any(0)
        tokens.values.masked_fill_(large_K, 0)
        branch = _branch(x_TK, tensors["qweight"], blob[0], large_K.nonzero()[:, 0])
        return scaled_matmul(tokens, tensors["qweight"], blob[0], layer.shape[1], x_TK.dtype, low_rank=branch)

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> tuple[tuple[int | None, str], ...]:
        """See `Describing.describe`."""
        from hf_quant.kernels._gemm.quantized import eight_bit, tile_of_k

        tile = tile_of_k(layer.shape[1], layer.shape[1])
        counts = (*((b, b) for b in BUCKETS), (None, BUCKETS[-1] + 1))
        return tuple((upto, told(eight_bit(count, *layer.shape, tile))) for upto, count in counts)


def _branch(x_TK: Tensor, W_NK: Tensor, scale: Tensor, kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """The columns of x and of the dequantized weight, filled up with zeros to one of few ranks to compile for."""
    if len(kept) == 0:
        return None
    room = (0, max(16, 1 << (len(kept) - 1).bit_length()) - len(kept))
    up = (W_NK[:, kept].float() * scale.T).to(x_TK.dtype)
    return F.pad(x_TK[:, kept], room), F.pad(up, room)
