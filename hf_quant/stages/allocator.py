"""Allocator: how many bits where, for a budget?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to quantize a site: its spec, the bits it takes on disk, and the loss it is expected to cost."""

    weights: Spec
    bits: int
    loss: float


# (site, spec) -> the ORIGINAL weight `[N, K]` rounded so by the recipe's range and solver; the pipeline lends it.
Rounded = Callable[[str, Spec], Tensor]


class Sensitivity(Protocol):
    """Fills the losses of the table: what rounding a site so costs the model (Hutchinson trace, one-site KL)."""

    def losses(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        choices: Sequence[Spec],
        rounded: Rounded,
        batches: Sequence[Batch],
        seed: int,
    ) -> dict[str, tuple[float, ...]]:
        """Site name -> the loss of each choice. `weights` are the model's own; it is left as it was found."""


class Allocator(Protocol):
    """Picks one choice a site so that the sum of bits stays within a budget and the sum of losses is least."""

    @property
    def choices(self) -> tuple[Spec, ...]:
        """The specs a site may get; the plan drops those that no format holds for it."""

    @property
    def bits(self) -> float:
        """The budget: true bits per quantized weight."""

    @property
    def sensitivity(self) -> Sensitivity:
        """What fills the table."""

    def allocate(self, table: Mapping[str, tuple[Choice, ...]], budget_bits: int) -> dict[str, Choice]:
        """Site name -> its choice."""
