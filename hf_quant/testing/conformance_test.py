"""The checks of methods, on ones of a stranger's (arXiv:2611.00001): a sound one passes, each fault is found.

    scale = (max W - min W) / (2^b - 1)

Shapes: W_NK weight; scale `[N, K / group_size]`.
Differs from the paper: there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.method import _METHODS, Method, Paper, list_methods, method
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest
from hf_quant.testing import conformance


def registered(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Recipe], **given: str) -> Method:
    """The function as a method, for one test."""
    list_methods()
    monkeypatch.setattr("hf_quant.method._METHODS", known := {**_METHODS})
    claim = given.get("claim", "it is at most as far off as rounding to nearest")
    method("a-strangers", paper=Paper("2611.00001", "A paper"), domains={"llm", "vit"}, claim=claim)(build)
    return known["a-strangers"]


def sound(bits: int = 4, group_size: int = 32, damp: float = 0.01) -> Recipe:
    """GPTQ, by another name."""
    return Recipe(weights=int_spec(bits, group_size), objective=LayerMse(), solver=Gptq(damp=damp))


def aimless(bits: int = 4, group_size: int = 32) -> Recipe:
    """GPTQ that minimizes nothing."""
    return Recipe(weights=int_spec(bits, group_size), solver=Gptq())


def untyped(bits=4) -> Recipe:
    """An argument of any kind."""
    return Recipe(weights=int_spec(bits, 32))


def lenient(bits: int = 4) -> Recipe:
    """Takes any width, and means another."""
    return Recipe(weights=int_spec(min(max(bits, 2), 8), 32))


@dataclass(frozen=True, slots=True)
class Drawing:
    """Codes that depend on the global generator."""

    def refuses(self, spec: Spec) -> str | None:
        return Nearest().refuses(spec)

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        return Nearest().solve(W_NK + 1e-2 * torch.randn(W_NK.shape), spec, fit, None)


def drawing(bits: int = 4) -> Recipe:
    """Noise from nobody's generator."""
    return Recipe(weights=int_spec(bits, 32), objective=LayerMse(), solver=Drawing())


# a process of its own takes seconds: hf_quant/every_method_test.py has it for every registered method
QUIET = [c for c in conformance.CHECKS if c is not conformance.runs_saves_and_loads]


@pytest.mark.parametrize("check", QUIET, ids=lambda c: c.__name__)
def test_a_sound_method_keeps_the_contracts(
    check: conformance.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(registered(monkeypatch, sound), tmp_path)


@pytest.mark.parametrize(
    ("build", "check"),
    [
        (aimless, conformance.its_solver_gets_what_it_minimizes),
        (untyped, conformance.its_signature_is_its_configuration),
        (lenient, conformance.refuses_impossible_arguments),
        (drawing, conformance.its_second_domain),
    ],
    ids=lambda given: given.__name__,
)
def test_faults_are_found(
    build: Callable[..., Recipe], check: conformance.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        check(registered(monkeypatch, build), tmp_path)


def test_a_claim_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        conformance.says_what_it_is(registered(monkeypatch, sound, claim="better"), tmp_path)
