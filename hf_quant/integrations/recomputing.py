"""Gradient checkpointing of a transformers model, whatever its release calls it."""

from typing import Any

from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Have every block compute its activations again in the backward pass (non-reentrant)."""
    anything: Any = model
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.20
    getattr(anything, f"{name}_checkpointing_enable")({"use_reentrant": False})
