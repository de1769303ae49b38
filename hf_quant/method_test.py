"""Registering: what no user could call is refused where it is written."""

from collections.abc import Callable
from typing import Any

import pytest

from hf_quant import QuantConfig, list_methods
from hf_quant.errors import ConfigError
from hf_quant.method import _METHODS, Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec

GIVEN: dict[str, Any] = {"paper": Paper(None, "A paper"), "domains": {"llm"}, "claim": "It is registered here."}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    list_methods()
    monkeypatch.setattr("hf_quant.method._METHODS", {**_METHODS})


def _fine(bits: int = 4) -> Recipe:
    return Recipe(weights=int_spec(bits))


def _takes_all(*bits: int) -> Recipe:
    return Recipe(weights=int_spec(*bits))


def _hidden(bits: int = 4, seed: int = 0) -> Recipe:
    return Recipe(weights=int_spec(bits))


@pytest.mark.parametrize(
    ("method_id", "given", "build", "told"),
    [
        (None, {}, _fine, "lower case"),
        ("My_Paper", {}, _fine, "lower case"),
        ("my-paper", {"paper": "2210.17323"}, _fine, "a Paper"),
        ("my-paper", {"domains": ["llm"]}, _fine, "a set of"),
        ("my-paper", {"domains": {"cv"}}, _fine, "a set of"),
        ("my-paper", {}, _takes_all, r"\*bits: int is no parameter"),
        ("my-paper", {}, _hidden, "seed is a parameter of every QuantConfig"),
        ("gptq", {}, _fine, "registered twice: hf_quant.plugins.rounding.gptq and"),
    ],
)
def test_a_wrong_registration(method_id: Any, given: dict[str, Any], build: Callable[..., Recipe], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        method(method_id, **{**GIVEN, **given})(build)


def test_what_a_method_gives_is_a_recipe() -> None:
    def forgets(bits: int = 4) -> Any:
        Recipe(weights=int_spec(bits))

    def refuses(bits: int = 4) -> Recipe:
        raise ValueError("bits must be odd")

    def misspelt(bits: "Integer" = 4) -> Recipe:  # type: ignore[name-defined]  # noqa: F821
        return _fine(bits)

    for build, told in ((forgets, "NoneType, no Recipe"), (refuses, "must be odd"), (misspelt, "'Integer' is not")):
        method("my-paper", **GIVEN)(build)
        with pytest.raises(ConfigError, match=told):
            QuantConfig("my-paper", bits=4)
