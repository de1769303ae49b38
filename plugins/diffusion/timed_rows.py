"""Sampled inputs together with the entry of the tables that each belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.stats import Reduction, Rows, Seen, State


@dataclass(frozen=True, slots=True)
class TimedRows:
    """`Rows` of `[x, e]`: a uniform sample over all entries; the entry e is the tag "timestep"."""

    count: int = 512

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """As the rows."""
        return Rows(self.count).reduce

    @property
    def two_streams(self) -> bool:
        """One stream."""
        return False

    @property
    def tags(self) -> tuple[str, ...]:
        """The entry of each token."""
        return ("timestep",)

    def start(self, K: int, device: torch.device) -> State:
        """Unfilled rows, a column wider."""
        return Rows(self.count).start(K + 1, device)

    def update(self, state: State, seen: Seen) -> None:
        """Keep the smallest keys of what was kept and what is new."""
        entry = seen.tags["timestep"].to(seen.x_TK.device).float()[:, None]
        Rows(self.count).update(state, Seen(torch.cat([seen.x_TK.float(), entry], 1)))

    def values(self, state: State) -> tuple[Tensor, Tensor]:
        """(x `[R, K]`, entries int64 `[R]`)."""
        rows = Rows(self.count).values(state)
        return rows[:, :-1], rows[:, -1].long()
