"""Objective: what error counts? Everything here becomes one quadratic form that any solver can take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from hf_quant.products import widened
from hf_quant.stages.sampler import Batch, model_inputs_of
from hf_quant.stats import CrossGram, DriftGram, Gram, Reduction, Seen, Stat, State, Stats, hessian


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """`tr(E H E^T) + 2 tr(W D E^T)` with `E = W - Q`: the output error of a layer, less what no code can change.

    `H_KK = (2/N) X X^T`; `D_KK = (2/N) (X~ - X) X^T` when the target is the full-precision output W X~, else None.
    `F_NK`: when each weight has an importance of its own, `sum F E^2` is the error and H the nearest diagonal form of
    it; else None. `DD_KK = (2/N) (X~ - X) (X~ - X)^T` for a solver that weighs how much of the drift it should follow.
    """

    H_KK: Tensor
    D_KK: Tensor | None = None
    F_NK: Tensor | None = None
    DD_KK: Tensor | None = None


class Objective(Protocol):
    """Turns captured statistics into the error a solver minimizes."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads."""

    def quadratic(self, stats: Stats) -> Quadratic:
        """The error as a quadratic form."""


@dataclass(frozen=True, slots=True)
class LayerMse:
    """`||(W - Q) X||^2`: outputs on the quantized path's own inputs."""

    needs: ClassVar[tuple[Stat, ...]] = (Gram(),)

    def quadratic(self, stats: Stats) -> Quadratic:
        """H alone."""
        return Quadratic(hessian(stats))


@dataclass(frozen=True, slots=True)
class AsymmetricMse:
    """`||W X~ - Q X||^2`: aim at the output that the full-precision path has (GPTAQ).

    Attributes:
        share: how much of the drift the target follows: 0 none, 1 all of it.
    """

    share: float = 1.0
    needs: ClassVar[tuple[Stat, ...]] = (Gram(), CrossGram())

    def quadratic(self, stats: Stats) -> Quadratic:
        """H and the drift term D."""
        count = stats[Gram()]["count"].clamp_min(1)
        return Quadratic(hessian(stats), (stats[CrossGram()]["dx"] * (2.0 * self.share / count)).float())


@dataclass(frozen=True, slots=True)
class MismatchMse:
    """`||W X~ - Q X||^2` for a solver that chooses how much of the drift to follow (CoreQ)."""

    needs: ClassVar[tuple[Stat, ...]] = (Gram(), CrossGram(), DriftGram())

    def quadratic(self, stats: Stats) -> Quadratic:
        """H, the drift term D and the drift's own energy."""
        each = 2.0 / stats[Gram()]["count"].clamp_min(1)
        D, DD = stats[CrossGram()]["dx"] * each, stats[DriftGram()]["dd"] * each
        return Quadratic(hessian(stats), D.float(), DD_KK=DD.float())


class Loss(Protocol):
    """What the whole model is judged by: for sensitivities, Fisher statistics and training."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A differentiable scalar, the mean over the micro-batch."""


@dataclass(frozen=True, slots=True)
class ModelLoss:
    """The loss a transformers model computes itself; a language model without labels predicts its own input."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """`model(**inputs, labels=...).loss`."""
        inputs = model_inputs_of(batch)
        with widened():
            loss: Tensor = model(**{"labels": inputs.get("input_ids"), **inputs}).loss
        return loss


@dataclass(frozen=True, slots=True)
class Fisher:
    """`square = sum over samples (d loss / d W)^2` in the float model, before anything is quantized: float64 `[N, K]`.

    A statistic of a weight, not of its input: the loop takes it from gradients (`fisher.py`). In what a splitter
    is given, it is that of all weights of the group, one above the other.
    """

    loss: Loss = ModelLoss()
    reduce: ClassVar[Mapping[str, Reduction]] = {"square": "sum"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Nothing: inputs say nothing of it."""
        return {}

    def update(self, state: State, seen: Seen) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class FisherMse:
    """`sum F E^2`: what the loss gains, to second order, by independent errors of the weights."""

    fisher: Fisher = Fisher()

    @property
    def needs(self) -> tuple[Stat, ...]:
        """Squared gradients."""
        return (self.fisher,)

    def quadratic(self, stats: Stats) -> Quadratic:
        """F, and its mean over the rows as the diagonal of H."""
        square = stats[self.fisher]["square"]
        return Quadratic(square.mean(0).float().diag(), F_NK=square.float())
