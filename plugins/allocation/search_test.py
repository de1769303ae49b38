"""Searches against trying everything, and against each other."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.plugins.allocation.search import Greedy, Knapsack, Milp, Pareto
from hf_quant.plugins.allocation.search_core import pareto_front, price, totals

Table = tuple[list[list[int]], list[list[float]], int]


@st.composite
def tables(draw: st.DrawFn, slots: int, choices: int) -> Table:
    """Costs in few sizes or many, losses with ties, zeros and more bits that cost more; a budget that can be met."""
    unit = draw(st.sampled_from([1, 8, 1000]))
    sizes = st.lists(st.integers(0, 40), min_size=1, max_size=choices)
    bits = [[unit * b for b in draw(sizes)] for _ in range(draw(st.integers(1, slots)))]
    loss = st.one_of(st.integers(0, 5).map(float), st.floats(0, 10, allow_subnormal=False), st.floats(1e-9, 1e-6))
    losses = [draw(st.lists(loss, min_size=len(row), max_size=len(row))) for row in bits]
    least, most = sum(map(min, bits)), sum(map(max, bits))
    return bits, losses, draw(st.integers(least, most + 1))


def everything(bits: list[list[int]], losses: list[list[float]]) -> list[tuple[int, float]]:
    return [totals(bits, losses, picks) for picks in product(*(range(len(row)) for row in bits))]


def best(table: Table) -> float:
    bits, losses, budget = table
    return min(loss for size, loss in everything(bits, losses) if size <= budget)


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


@given(tables(5, 4))
@settings(max_examples=300, deadline=None)
def test_the_dynamic_program_is_exact(table: Table) -> None:
    bits, losses, budget = table
    size, loss = totals(bits, losses, Knapsack().pick(*table))
    assert size <= budget
    assert same(loss, best(table))


@given(tables(5, 4))
@settings(max_examples=100, deadline=None)
def test_the_front_is_every_pick_that_none_beats(table: Table) -> None:
    bits, losses, _ = table
    front = [totals(bits, losses, picks) for picks in pareto_front(bits, losses)]
    every = everything(bits, losses)
    kept = sorted({p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every)})
    assert [size for size, _ in front] == sorted({size for size, _ in front})
    for size, loss in kept:
        assert any(s <= size and (l <= loss or same(l, loss)) for s, l in front)
    assert same(totals(bits, losses, Pareto().pick(*table))[1], best(table))


@given(tables(5, 4))
@settings(max_examples=100, deadline=None)
def test_greedy_keeps_the_budget_and_never_ends_above_the_start(table: Table) -> None:
    bits, losses, budget = table
    size, loss = totals(bits, losses, Greedy().pick(*table))
    start = [row.index(min(row)) for row in bits]
    assert size <= budget
    assert loss <= totals(bits, losses, start)[1] + 1e-12
    assert loss >= best(table) or same(loss, best(table))


@given(tables(12, 6))
@settings(max_examples=50, deadline=None)
def test_integer_programming_agrees(table: Table) -> None:
    bits, losses, budget = table
    size, loss = totals(bits, losses, Milp().pick(*table))
    _, exact = totals(bits, losses, Knapsack().pick(*table))
    assert size <= budget
    assert math.isclose(loss, exact, abs_tol=2e-6 * max(map(max, losses)))  # HiGHS stops at a gap of 1e-6


def model_like(layers: int) -> Table:
    """The slots of a language model: four shapes a layer, six widths, losses that fall fourfold a bit."""
    bits, losses = [], []
    for layer in range(layers):
        for kind, size in enumerate((1536, 1024, 5632, 2816)):
            widths = (2, 3, 4, 5, 6, 8)
            bits.append([size * 1024 * w + size * 128 for w in widths])
            losses.append([(1 + math.sin(3.7 * layer + kind) ** 2 * 20) * size * 4.0**-w for w in widths])
    return bits, losses, int(sum(row[1] for row in bits) * 1.13)


@pytest.mark.parametrize("search", [Milp(), Pareto(), Greedy()], ids=lambda s: type(s).__name__)
def test_a_large_model_takes_a_moment_and_comes_out_alike(search: Milp | Pareto | Greedy) -> None:
    bits, losses, budget = model_like(32)
    size, loss = totals(bits, losses, search.pick(bits, losses, budget))
    exact_size, exact = totals(bits, losses, Knapsack().pick(bits, losses, budget))
    assert size <= budget
    assert exact_size <= budget
    assert exact <= loss * (1 + 1e-9)
    assert loss <= exact * (1.00001 if isinstance(search, Milp) else 1.01)


def test_the_price_is_where_the_budget_is_met() -> None:
    bits, losses, budget = model_like(4)
    p = price(bits, losses, budget)
    assert p > 0
    assert price(bits, losses, sum(map(max, bits))) == 0
    assert price(bits, losses, budget // 2) > p


def test_a_thinned_front_keeps_its_ends() -> None:
    bits, losses, _ = model_like(6)
    front = pareto_front(bits, losses, most=50)
    assert len(front) <= 50
    assert totals(bits, losses, front[0])[0] == sum(map(min, bits))
    assert totals(bits, losses, front[-1])[0] == sum(map(max, bits))
