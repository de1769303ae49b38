"""The gradient of a product with a packed weight, as an operator of its format: `hf_quant::<id>_gradient`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant.products import product

if TYPE_CHECKING:
    from hf_quant.formats import Kernel, Layer, PackedFormat, Tensors


@runtime_checkable
class Differentiating(Protocol):
    """A kernel with a gradient of its own, such as one that makes no whole dense weight."""

    def gradient(self, grad_TN: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """`grad_TN W`, `[T, K]`, of the same weight to the bit as `PackedFormat.weight`'s."""


def gradient_operator(
    fmt: PackedFormat, kernels: Mapping[str, Kernel], names: Callable[[str, str], list[str]]
) -> Callable[..., Tensor]:
    """`(grad_TN, tensors, blob, layer, kernel) -> grad_TK`; `names` are those of the tensors that a kernel keeps."""

    def gradient(grad: Tensor, tensors: list[Tensor], blob: list[Tensor], layer: str, kernel: str) -> Tensor:
        named, whole = dict(zip(names(layer, kernel), tensors, strict=True)), key_of(layer)
        chosen = kernels.get(kernel)
        if isinstance(chosen, Differentiating):
            return chosen.gradient(grad, named, blob, whole)
        return product(grad, fmt.weight(named | fmt.restore(blob, whole, kernel), whole, grad.dtype).T)

    def shape(grad: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401
        return grad.new_empty(grad.shape[0], key_of(rest[2]).shape[1])

    from hf_quant.formats import Layer

    key_of = Layer.from_key
    name = "hf_quant::" + fmt.id.replace("-", "_").replace("/", "_") + "_gradient"
    schema = "(Tensor grad, Tensor[] tensors, Tensor[] blob, str layer, str kernel) -> Tensor"
    op = torch.library.custom_op(name, gradient, mutates_args=(), schema=schema)
    op.register_fake(shape)
    return op
