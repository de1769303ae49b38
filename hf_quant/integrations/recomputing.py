"""Gradient checkpointing of a transformers model, whatever its release calls it."""

from typing import Any

from torch import nn


def recompute_activations(model: nn.Module, *, on: bool = True) -> None:
    """Have every block compute its activations again in the backward pass (non-reentrant), or no longer."""
    anything: Any = model
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.20
    if on:
        getattr(anything, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(anything, f"{name}_checkpointing_disable")()
