"""Explain: which kernel every quantized module runs, and why each other one refused."""

from dataclasses import dataclass

import torch
from torch import nn

from hf_quant.runtime.packed import Packed


@dataclass(frozen=True, slots=True)
class Row:
    """One quantized module.

    Attributes:
        name: dotted path in the model.
        format: id of its packed format.
        shape: (N, K).
        kernel: what runs: a kernel's name, "reference", or "lookup" for an embedding.
        refused: kernel name -> why it does not run here.
        device: where its tensors are.
        dtype: the compute dtype the kernel was chosen for.
    """

    name: str
    format: str
    shape: tuple[int, int]
    kernel: str
    refused: dict[str, str]
    device: torch.device
    dtype: torch.dtype


def explain(model: nn.Module) -> list[Row]:
    """A row a quantized module, in order. Inputs of another type or device than the row says run the reference."""
    return [
        Row(
            name,
            module.format.id,
            module.matrix_shape,
            module.kernel,
            dict(module.refused),
            module.qweight.device,
            module.compute_dtype,
        )
        for name, module in model.named_modules()
        if isinstance(module, Packed)
    ]
