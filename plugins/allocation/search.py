"""Searches an allocator can use: exact by dynamic programming, by integer programming, on the Pareto front; greedy.

`min sum loss` subject to `sum bits <= budget`, one choice a slot. Knapsack and Milp give the same loss; Knapsack needs
no other library and is the one to take. The mathematics is in `search_core.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_quant.plugins.allocation import search_core as core


@dataclass(frozen=True, slots=True)
class Knapsack:
    """The optimum, by a dynamic program over integer bits."""

    def pick(self, bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """See `Search.pick`."""
        return core.dynamic_program(bits, losses, budget)


@dataclass(frozen=True, slots=True)
class Milp:
    """The optimum, by scipy's HiGHS."""

    def pick(self, bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """See `Search.pick`."""
        return core.mixed_integer_program(bits, losses, budget)


@dataclass(frozen=True, slots=True)
class Pareto:
    """The point of the Pareto front of (bits, loss) with the least loss that the budget allows."""

    most: int = 4096

    def pick(self, bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """See `Search.pick`."""
        front = core.pareto_front(bits, losses, self.most)
        return [p for p in front if core.totals(bits, losses, p)[0] <= budget][-1]


@dataclass(frozen=True, slots=True)
class Greedy:
    """From the smallest choices up, what saves most loss a bit; near the optimum, and not always it."""

    def pick(self, bits: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """See `Search.pick`."""
        return core.greedy(bits, losses, budget)
