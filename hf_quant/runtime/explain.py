"""Explain: what every quantized module runs at how many tokens, and why each other kernel refused."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant.formats import Layer
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import Packed, parts_of

Runs = tuple[tuple[int | None, str], ...]  # (up to so many tokens, what runs), ascending; None: any number of them


@runtime_checkable
class Describing(Protocol):
    """A kernel that says what it does."""

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Runs:
        """What runs for tokens of this type; neighbours may be equal."""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantized module.

    Attributes:
        name: dotted path in the model, or from the component of a pipeline on.
        format: id of its packed format.
        shape: (N, K).
        kernel: what runs: a kernel's name, "reference", or "lookup" for an embedding.
        refused: kernel name -> why it does not run here.
        fused: what of the layer besides the product its kernel takes on: names of `formats.Around`'s attributes.
        runs: what the kernel does, where it says so: see `Runs`.
        device: where its tensors are.
        dtype: the compute dtype the kernel was chosen for.
    """

    name: str
    format: str
    shape: tuple[int, int]
    kernel: str
    refused: dict[str, str]
    fused: tuple[str, ...]
    runs: Runs
    device: torch.device
    dtype: torch.dtype


def explain(model: Any) -> list[Row]:  # noqa: ANN401  a model, or a pipeline of diffusers
    """A row a quantized module, in order. Inputs of another type or device than the row says run the reference.

    Kernels that say how they run have their weights laid out for it, as the first forward would.
    """
    return [
        Row(
            name,
            module.format.id,
            module.matrix_shape,
            module.kernel,
            dict(module.refused),
            tuple(sorted(module.fused)) if isinstance(module, QuantLinear) else (),
            _runs(module),
            module.qweight.device,
            module.compute_dtype,
        )
        for part, network in parts_of(model).items()
        for name, module in network.named_modules(prefix=part)
        if isinstance(module, Packed)
    ]


def _runs(module: Packed) -> Runs:
    kernel = next((k for k in module.format.kernels if k.name == module.kernel), None)
    if not isinstance(kernel, Describing) or not isinstance(module, QuantLinear):
        return ()
    blob, layer = module.laid_out()
    runs = kernel.describe(blob, layer, module.compute_dtype)
    following: tuple[str | None, ...] = (*(what for _, what in runs[1:]), None)
    return tuple(run for run, then in zip(runs, following, strict=True) if run[1] != then)
