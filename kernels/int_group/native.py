"""The C++ kernel of `int-group/1` on CPU: 16-bit tokens, and integer tokens where inputs become integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels._cpu import layout
from hf_quant.kernels._cpu.kernel import SLICE, NativeKernel
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits
from hf_quant.kernels.int_group.reference import zero_codes
from hf_quant.products import operand


@dataclass(frozen=True, slots=True)
class Native(NativeKernel):
    """Every layer of the format whose groups are whole blocks; 1 to 3 bits lie as 4, and 5 to 7 as 8."""

    def takes(self, layer: Layer) -> str | None:
        """See `NativeKernel.takes`."""
        return None

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return unpack_bits(qweight, int(layer.weights.grid.bits), layer.shape[1])

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return pack_bits(codes_NK, int(layer.weights.grid.bits))

    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[Tensor, Tensor]:
        """See `NativeKernel.ranges`."""
        grid, zero = layer.weights.grid, zero_codes(tensors, layer)
        assert isinstance(grid, IntGrid)  # noqa: S101  `holds` has checked it
        scale = tensors["scale"].float()
        return scale, torch.full((1, scale.shape[1]), -float(grid.low)) if zero is None else zero.float()

    def gradient(self, grad_TN: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Differentiating.gradient`: some whole groups of columns dequantized at a time."""
        (N, K), group = layer.shape, layer.weights.block_size(layer.shape)[1]
        scale, zero = (t.expand(N, -1) for t in self.ranges(tensors, layer))
        grad_TK, inputs = grad_TN.new_empty(grad_TN.shape[0], K), layout.block(self.kind(layer))[1]
        grad = operand(grad_TN)
        step = max(1, SLICE // max(1, N * group)) * group if group < K else max(8, SLICE // N // 8 * 8)
        for first in range(0, K, step):
            columns = slice(first, min(first + step, K))
            blocks = blob[0][:, first // inputs : -(-columns.stop // inputs)]
            W = self.unpacked(blocks, layer)[:N, : columns.stop - first].float()
            index = torch.arange(first, columns.stop) // group
            W = W.sub_(zero[:, index]).mul_(scale[:, index])
            grad_TK[:, columns] = grad @ W.to(grad_TN.dtype).to(grad.dtype)
        return grad_TK
