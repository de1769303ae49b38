"""Searches on plain numbers: pick one choice a slot, `min sum loss` subject to `sum bits <= budget`.

`bits` are integers and `losses` floats, both `[slot][choice]`; a pick is the index of each slot's choice.

The dynamic program is exact: it keeps, slot after slot, every (bits, loss) that no other beats in both (Nemhauser and
Ullmann, Management Science 15, 1969). States that cannot lead to the optimum are dropped by a bound: for any price
`p >= 0` a bit, whatever completes a state costs at least `sum min (loss + p bits) - p (bits that are left)`.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_quant.errors import RunError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Bits = Sequence[Sequence[int]]
Losses = Sequence[Sequence[float]]


def totals(bits: Bits, losses: Losses, picks: Sequence[int]) -> tuple[int, float]:
    """(sum of bits, sum of losses) of a pick."""
    rows = range(len(picks))
    return sum(bits[i][picks[i]] for i in rows), math.fsum(losses[i][picks[i]] for i in rows)


def greedy(bits: Bits, losses: Losses, budget: int) -> list[int]:
    """From the smallest choices up: again and again the change that saves most loss a bit, of those that fit."""
    picks = [min(range(len(row)), key=lambda c, row=row: (row[c], c)) for row in bits]  # type: ignore[misc]
    left = budget - totals(bits, losses, picks)[0]
    queue: list[tuple[float, int, int, int]] = []

    def offer(i: int) -> None:
        for c, b in enumerate(bits[i]):
            more, less = b - bits[i][picks[i]], losses[i][picks[i]] - losses[i][c]
            if less > 0 and more <= left:
                heapq.heappush(queue, (-less / more if more > 0 else -math.inf, i, c, picks[i]))

    for i in range(len(bits)):
        offer(i)
    while queue:
        _, i, c, start = heapq.heappop(queue)
        more = bits[i][c] - bits[i][picks[i]]
        if start != picks[i] or more > left:
            continue  # its slot has moved on, or it fits no more
        left -= more
        picks[i] = c
        offer(i)
    return picks


def price(bits: Bits, losses: Losses, budget: int) -> float:
    """The loss a bit is worth: the price at which the best choice of every slot for itself just fits the budget."""

    def spent(p: float) -> int:
        return sum(min((l + p * b, b) for b, l in zip(*row, strict=True))[1] for row in zip(bits, losses, strict=True))

    if spent(0.0) <= budget:
        return 0.0
    span = max(l for row in losses for l in row) - min(l for row in losses for l in row)
    low, high = 0.0, max(span, 1e-300)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def dynamic_program(bits: Bits, losses: Losses, budget: int) -> list[int]:
    """The optimum, exactly; of picks with equal loss one with the fewest bits."""
    known = totals(bits, losses, greedy(bits, losses, budget))[1]
    p = price(bits, losses, budget)
    cheapest = [min(l + p * b for b, l in zip(*row, strict=True)) for row in zip(bits, losses, strict=True)]
    smallest = [min(row) for row in bits]
    rest, room = math.fsum(cheapest), budget - sum(smallest)
    slack = 1e-9 * (abs(known) + abs(rest) + p * budget)
    stages: list[tuple[IntArray, IntArray]] = []
    total = np.zeros(1, np.int64), np.zeros(1)
    for row_bits, row_losses, least, small in zip(bits, losses, cheapest, smallest, strict=True):
        rest, room = rest - least, room + small
        total, parents = _extend(*total, row_bits, row_losses)
        bound = total[1] + rest - p * (budget - total[0])
        keep = (total[0] <= room) & (np.maximum(bound, total[1] + _least(losses, len(stages))) <= known + slack)
        total = total[0][keep], total[1][keep]
        stages.append((parents[0][keep], parents[1][keep]))
    return _trace(stages, int(np.argmin(total[1])))


def _least(losses: Losses, done: int) -> float:
    """What the slots after the first `done + 1` cost at the very least."""
    return math.fsum(min(row) for row in losses[done + 1 :])


def pareto_front(bits: Bits, losses: Losses, most: int = 4096) -> list[list[int]]:
    """Picks that none beats in both bits and loss, by rising bits.

    Exact while no more than `most` states arise on the way; past that the best of each of about `most` equal steps in
    bits stays, the smallest and the largest of all among them.
    """
    stages: list[tuple[IntArray, IntArray]] = []
    total = np.zeros(1, np.int64), np.zeros(1)
    for row_bits, row_losses in zip(bits, losses, strict=True):
        total, parents = _extend(*total, row_bits, row_losses)
        if len(total[0]) > most:
            step = (total[0] - total[0][0]) * (most - 2) // (total[0][-1] - total[0][0])
            keep = np.append(step[1:] != step[:-1], True)  # the last of each step has its lowest loss
            keep[0] = True
            total, parents = (total[0][keep], total[1][keep]), (parents[0][keep], parents[1][keep])
        stages.append(parents)
    return [_trace(stages, end) for end in range(len(total[0]))]


def _extend(
    bits: IntArray, losses: FloatArray, row_bits: Sequence[int], row_losses: Sequence[float]
) -> tuple[tuple[IntArray, FloatArray], tuple[IntArray, IntArray]]:
    """All states with one more slot, less those that another beats: (bits, losses) and (parent, choice)."""
    b = (bits[:, None] + np.asarray(row_bits, np.int64)).ravel()
    l = (losses[:, None] + np.asarray(row_losses, np.float64)).ravel()
    order = np.lexsort((l, b))
    best = np.minimum.accumulate(l[order])
    order = order[np.append(True, l[order][1:] < best[:-1])]
    return (b[order], l[order]), (order // len(row_bits), order % len(row_bits))


def _trace(stages: Sequence[tuple[IntArray, IntArray]], end: int) -> list[int]:
    picks = []
    for parents, choices in reversed(stages):
        picks.append(int(choices[end]))
        end = int(parents[end])
    return picks[::-1]


def mixed_integer_program(bits: Bits, losses: Losses, budget: int) -> list[int]:
    """The optimum by scipy's HiGHS: `x` in {0, 1}, one choice a slot, the bits within the budget.

    Raises:
        RunError: HiGHS gave up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(row) for row in bits]
    least = [min(row) for row in bits]
    extra = np.array([b - m for row, m in zip(bits, least, strict=True) for b in row], np.int64)
    unit = max(1, int(np.gcd.reduce(extra)))
    weight, room = extra // unit, (budget - sum(least)) // unit
    cost = np.array([l for row in losses for l in row])
    scale = max(float(np.abs(cost).max()), 1e-300)
    slot = np.repeat(np.arange(len(sizes)), sizes)
    once = csr_array((np.ones(len(slot)), (slot, np.arange(len(slot)))))
    starts = np.cumsum([0, *sizes[:-1]])
    limit = room
    while True:
        found = milp(
            cost / scale,
            integrality=np.ones_like(cost),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(weight[None, :], -np.inf, limit)],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RunError(f"scipy's HiGHS found no allocation: {found.message}")
        picks = [int(np.argmax(found.x[s : s + n])) for s, n in zip(starts, sizes, strict=True)]
        over = int(weight[starts + np.array(picks)].sum()) - room
        if over <= 0:
            return picks
        limit -= over  # HiGHS keeps constraints to a tolerance only
