"""A budget on a trained model: what it saves against a uniform width, and against the line between two of them."""

from dataclasses import replace

import pytest

from hf_quant import QuantConfig
from hf_quant.recipe import Recipe

SEEDS = range(3)
TRUE = {2: 2 + 18 / 128, 3: 3 + 19 / 128, 4: 4 + 20 / 128}  # bits in groups of 128, scales and zero points counted


def test_claim(claims, distance) -> None:  # type: ignore[no-untyped-def]
    mixed = QuantConfig("mixed", bits=3).quantizer()
    assert isinstance(mixed, Recipe)
    uniform = replace(mixed, allocator=None)
    statement = "KL below rtn's at the size of 3 bits in groups of 128"
    claims.order("mixed", statement, ours=[distance(mixed, 0)], theirs=[distance(uniform, 0)], factor=0.8)


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(2, 3), (3, 4)])
def test_a_budget_between_two_widths_lands_below_the_line_between_them(claims, distance, low: int, high: int) -> None:  # type: ignore[no-untyped-def]
    ends = [QuantConfig("gptq", bits=bits).quantizer() for bits in (low, high)]
    between = QuantConfig("gptq", budget=f"{(TRUE[low] + TRUE[high]) / 2} bits").quantizer()
    ours = [distance(between, seed) for seed in SEEDS]
    line = [sum(distance(end, seed) for end in ends) / 2 for seed in SEEDS]
    statement = f"KL of gptq with a budget halfway between {low} and {high} bits below the mean of theirs"
    claims.order("mixed", statement, ours=ours, theirs=line)
