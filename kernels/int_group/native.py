"""The C++ kernel of `int-group/1` on CPU: 16-bit tokens, and integer tokens where inputs become integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels._cpu.kernel import WithGradient
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits
from hf_quant.kernels.int_group.reference import zero_codes


@dataclass(frozen=True, slots=True)
class Native(WithGradient):
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
