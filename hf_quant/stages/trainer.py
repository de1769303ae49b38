"""Trainer: quantization-aware training of a whole model, ending in the codes of its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Site name -> codes, and what was measured on the way (losses, seconds, bytes of optimizer state)."""

    weights: dict[str, QTensor]
    measured: dict[str, float]


class Trainer(Protocol):
    """Trains the weights (or low-rank terms, or scales) of a float model so that rounding them loses little."""

    def refuses(self, model: nn.Module, spec: Spec) -> str | None:
        """None when it can train this model for this spec, else the reason (asked at plan time)."""

    def train(self, model: nn.Module, start: Mapping[str, QTensor], batches: Sequence[Batch], seed: int) -> Trained:
        """Fit the sites of `start`, which hold what the solver gave.

        `model` comes in float and fake-quantized in place by the trainer (see `stages.fakequant`); parameters that are
        not sites may be trained in place. Nothing of the training is left in it; the pipeline installs the codes.
        """
