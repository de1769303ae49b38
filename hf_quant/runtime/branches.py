"""Branches: full-precision terms added to a quantized layer's output."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`y += (x down^T) up^T` with `down_RK`, `up_NR`."""

    down_RK: Tensor
    up_NR: Tensor

    def matrix(self, rows: slice = slice(None)) -> Tensor:
        """The term, or some rows of it, as a dense float32 `[N, K]`."""
        return self.up_NR[rows].float() @ self.down_RK.float()


Branch = LowRank
