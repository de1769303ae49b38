"""The C++ kernel of `bnb-nf4/1` and `bnb-fp4/1` on CPU: bitsandbytes' levels looked up in registers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._cpu.kernel import WithGradient
from hf_quant.kernels._cpu.layout import Kind
from hf_quant.kernels.bnb_4bit.scales import block_scales


@dataclass(frozen=True, slots=True)
class Native(WithGradient):
    """`table[code] scale`; `levels` in the order of bitsandbytes' codes."""

    levels: tuple[float, ...]

    def takes(self, layer: Layer) -> str | None:
        """See `NativeKernel.takes`."""
        return None

    def kind(self, layer: Layer) -> Kind:
        """See `NativeKernel.kind`."""
        return "floats4"

    def middle(self, layer: Layer) -> int:
        """None: codes stand for what the table says."""
        return 0

    def values(self, tensors: Tensors, layer: Layer) -> Tensor:
        """See `NativeKernel.values`."""
        return torch.tensor(self.levels)

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return torch.stack((qweight >> 4, qweight & 15), -1).flatten(1)

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return codes_NK[:, ::2] << 4 | codes_NK[:, 1::2]

    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[Tensor, None]:
        """See `NativeKernel.ranges`."""
        return block_scales(tensors), None
