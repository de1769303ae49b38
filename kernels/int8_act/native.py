"""The C++ kernel of `int8-act/1` on CPU: tokens quantized in one pass, integers times integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels._cpu.kernel import WithGradient, integer_tokens


@dataclass(frozen=True, slots=True)
class Native(WithGradient):
    """Exact in int32 until the scales."""

    def takes(self, layer: Layer) -> str | None:
        """See `NativeKernel.takes`."""
        return (
            None if integer_tokens(layer.inputs) else "unsigned tokens without a zero point, or scales of another type"
        )

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return qweight.view(torch.uint8) ^ 0x80

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return (codes_NK ^ 0x80).view(torch.int8)

    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[Tensor, None]:
        """See `NativeKernel.ranges`."""
        return tensors["scale"].float(), None
