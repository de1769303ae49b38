"""Serving: what must inference carry besides the packed weights?"""

from typing import Protocol

from torch import Tensor, nn


class Serving(Protocol):
    """Tables and caches that a quantized model needs at run time (per-step scales, cached temporal features)."""

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        """Named tensors to store with the checkpoint."""
