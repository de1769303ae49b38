"""What can be said of a size, what is refused, and how it goes through QuantConfig and JSON."""

import json

import pytest

from hf_quant.allocation.budget import WIDTHS, Budget
from hf_quant.config import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.recipe import Recipe


@pytest.mark.parametrize(
    ("size", "bits", "count"),
    [
        ("3.2 bits", 3.2, None),
        ("4bits", 4.0, None),
        ("6.5 GB", None, 6_500_000_000),
        ("fits in 6.5 GB", None, 6_500_000_000),
        ("900 MB", None, 900_000_000),
        ("120000000 bytes", None, 120_000_000),
        ("1.5 MiB", None, 3 << 19),
    ],
)
def test_sizes_are_read(size: str, bits: float | None, count: int | None) -> None:
    budget = Budget(size)
    assert (budget.bits, budget.bytes) == (bits, count)


@pytest.mark.parametrize(
    "size", ["3.2", "3,2 bits", "-1 bits", "0 bits", "0 GB", "17 bits", "6.5 gigs", "", 3.2, None, True]
)
def test_other_sizes_are_one_error_with_examples(size: object) -> None:
    with pytest.raises(ConfigError, match=r'budget=.*"3\.2 bits".*"6\.5 GB"'):
        Budget(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fused": False}, "a mapping with size"),
        ({"size": "3 bits", "width": [2]}, "a mapping with size"),
        ({"size": "3 bits", "widths": []}, "ascending"),
        ({"size": "3 bits", "widths": [3, 2]}, "ascending"),
        ({"size": "3 bits", "widths": [2.5]}, "ascending"),
        ({"size": "3 bits", "fused": 1}, "true or false"),
        ({"size": "3 bits", "by": "gptq"}, "does not choose bits"),
        ({"size": "3 bits", "by": "hawq2"}, "unknown method"),
        ({"size": "3 bits", "widths": [9]}, "none of the widths"),
    ],
)
def test_mistakes_are_found_at_construction(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig("gptq", budget=given)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("gptq", {"bits": 4, "budget": "3 bits"}, "both say how many bits"),
        ("bnb-nf4", {"budget": "3 bits"}, "one width only"),
        ("lqer", {"budget": "3 bits"}, "branches beside its codes"),
        ("gptq", {"budget": "three bits"}, "3.2 bits"),
    ],
)
def test_what_a_budget_does_not_go_with(method: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(method, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "budget",
    ["3.2 bits", "900 MB", {"size": "3 bits", "fused": False}, {"size": "3 bits", "widths": [2, 4], "by": "mixed"}],
)
def test_json_and_repr_both_ways(budget: object) -> None:
    config = QuantConfig("gptq", group_size=64, budget=budget, skip=["*.o_proj"])  # type: ignore[arg-type]
    data = json.loads(json.dumps(config.to_dict()))
    assert data["budget"] == budget
    assert QuantConfig.from_dict(data) == config
    assert eval(repr(config)) == config


def test_the_method_stays_and_its_widths_are_the_choices() -> None:
    plain = QuantConfig("gptq", group_size=64, damp=0.02).quantizer()
    mixed = QuantConfig("gptq", group_size=64, damp=0.02, budget="3.2 bits").quantizer()
    assert isinstance(plain, Recipe)
    assert isinstance(mixed, Recipe)
    assert mixed.allocator is not None
    assert (mixed.solver, mixed.range, mixed.objective) == (plain.solver, plain.range, plain.objective)
    assert [c.grid.bits for c in mixed.allocator.choices] == list(WIDTHS)
    assert {c.block for c in mixed.allocator.choices} == {(1, 64)}
    assert not mixed.data_free


def test_an_override_that_names_bits_is_fixed_and_others_are_chosen_for() -> None:
    overrides = {"a": {"bits": 8}, "b": {"group_size": 32}, "c": {"method": "bnb-nf4"}, "d": None}
    recipes = QuantConfig("gptq", budget="3.2 bits", overrides=overrides).overridden()
    a, b, c = (recipes[n] for n in "abc")
    assert isinstance(a, Recipe)
    assert isinstance(b, Recipe)
    assert isinstance(c, Recipe)
    assert (a.allocator, c.allocator, recipes["d"]) == (None, None, None)
    assert b.allocator is not None
    assert {s.block for s in b.allocator.choices} == {(1, 32)}
