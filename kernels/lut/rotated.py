"""The kernel for rotated weights: rotate the input, not the weight."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.kernels.hadamard.op import rotate
from hf_quant.kernels.lut.decode import unpack
from hf_quant.products import product
from hf_quant.runtime.activation import fake_quantize


@dataclass(frozen=True, slots=True)
class RotatedInput:
    """`y = (R q(x)) V^T` with `V = W R^T`, the values as stored: R is orthogonal, and there are few inputs."""

    name: ClassVar[str] = "rotated-input"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if layer.weights.rotation is None:
            return "the weights are not rotated"
        return None if dtype in (torch.float32, torch.bfloat16, torch.float16) else f"not made for {dtype}"

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """Nothing."""
        return []

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        assert layer.weights.rotation is not None  # noqa: S101  `supports` has looked
        v_TK = rotate(fake_quantize(x_TK, layer.inputs, tensors), layer.weights.rotation)
        q = unpack(tensors, layer)
        stored = replace(q, spec=replace(q.spec, rotation=None))
        return product(v_TK, stored.dequantize(x_TK.dtype))
