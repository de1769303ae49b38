"""FakeQuant: a learnable map from a float weight to its rounded value, for training and reconstruction."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from hf_quant.qtensor import QTensor


class FakeQuant(nn.Module, ABC):
    """A parametrization of `weight` while it is learned (`torch.nn.utils.parametrize`); never saved.

    Invariant: once `anneal(1.0)` was called, `export(W).dequantize() == forward(W)` to the bit.
    """

    @abstractmethod
    def forward(self, W_NK: Tensor) -> Tensor:
        """The value the layer computes with, differentiable in what is learned."""

    @abstractmethod
    def export(self, W_NK: Tensor) -> QTensor:
        """The codes that stand for `forward(W_NK)`."""

    def anneal(self, progress: float) -> Tensor | None:
        """Told before each step how far training is (0 .. 1); returns a penalty to add to the loss, or None."""
        return None


class Rounding(Protocol):
    """Makes the FakeQuant of one weight (AdaRound, FlexRound, LSQ, LR-QAT, ...)."""

    def start(self, W_NK: Tensor, q: QTensor) -> FakeQuant:
        """Begins at what the solver gave: before any step `export(W_NK)` is `q` or as near as the form allows."""
