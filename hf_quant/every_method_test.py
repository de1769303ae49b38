"""What every registered method owes, whoever wrote it: being registered means being covered."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_quant.method import Method, list_methods
from hf_quant.testing import conformance
from hf_quant.testing.stranger import Stranger

METHODS = list_methods()
each_method = pytest.mark.parametrize("method", METHODS, ids=[m.id for m in METHODS])
QUIET = [c for c in conformance.CHECKS if c is not conformance.runs_saves_and_loads]


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    with Stranger() as process:
        yield process


@each_method
@pytest.mark.parametrize("check", QUIET, ids=[c.__name__ for c in QUIET])
def test_method(check: conformance.Check, method: Method, tmp_path: Path) -> None:
    check(method, tmp_path)


@each_method
def test_runs_saves_and_loads(method: Method, tmp_path: Path, stranger: Stranger) -> None:
    conformance.runs_saves_and_loads_at(method, tmp_path, stranger)


@pytest.mark.slow
@each_method
def test_every_other_domain(method: Method, tmp_path: Path) -> None:
    conformance.every_other_domain(method, tmp_path)
