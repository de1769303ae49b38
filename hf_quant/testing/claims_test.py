"""What counts as reproduced, and that it is kept."""

import json
from pathlib import Path

import pytest

from hf_quant.testing import Claims
from hf_quant.testing.claims import read
from hf_quant.testing.sources import fingerprint

pytest_plugins = ["pytester"]


def test_an_order_needs_the_mean_and_two_thirds_of_the_seeds() -> None:
    claims = Claims()
    assert claims.order("m", "lower", ours=[1, 1, 3], theirs=[2, 2, 2]).reproduced
    assert not claims.order("m", "one seed of three", ours=[0, 3, 3], theirs=[9, 2, 2], reproduced=False).reproduced
    assert not claims.order("m", "the mean", ours=[1, 1, 9], theirs=[2, 2, 2], reproduced=False).reproduced
    assert not claims.order("m", "by half", ours=[1.5] * 3, theirs=[2] * 3, factor=0.5, reproduced=False).reproduced
    with pytest.raises(AssertionError, match="said to be reproduced and is not"):
        claims.order("m", "lower", ours=[3] * 3, theirs=[2] * 3)
    with pytest.raises(AssertionError, match="said not to be reproduced and is"):
        claims.order("m", "lower", ours=[1] * 3, theirs=[2] * 3, reproduced=False)


def test_claims_are_kept_once_each_even_when_they_fail(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    with pytest.raises(AssertionError):
        claims.invariant("m", "nothing is lost", False, {"lost": 1.0})
    claims.invariant("m", "nothing is lost", True, {"lost": 0.0})
    claims.order("m", "lower", ours=[1], theirs=[2])
    kept = json.loads((tmp_path / "m.json").read_text())
    assert [(c["statement"], c["reproduced"]) for c in kept] == [("lower", True), ("nothing is lost", True)]
    assert kept[0]["figures"]["ratio"] == 0.5


def test_a_test_that_passed_owns_its_claims(tmp_path: Path) -> None:
    """What it claimed before and claims no more is gone, in every file; those of other tests stay."""
    first, other = Claims(tmp_path, "a_test.py::test_a"), Claims(tmp_path, "a_test.py::test_b")
    first.invariant("m", "old", True)
    first.invariant("n", "elsewhere", True)
    other.invariant("m", "of another", True)
    first.finish("1" * 16)
    again = Claims(tmp_path, "a_test.py::test_a")
    again.invariant("m", "new", True)
    assert {c.statement: c.source for c in read(tmp_path / "m.json")} == {"new": "", "of another": "", "old": "1" * 16}
    again.finish("2" * 16)
    assert {c.statement: c.source for c in read(tmp_path / "m.json")} == {"new": "2" * 16, "of another": ""}
    assert not (tmp_path / "n.json").exists()


PAPER = """
import lower

def test_order(claims):
    claims.order("m", "lower", ours=[lower.OURS] * 3, theirs=[2] * 3)

def test_invariant(claims):
    claims.invariant("m", "holds", True)
    assert lower.OURS != 1.75

def test_of_something_else():
    raise AssertionError("is not run under --claims")
"""


def test_what_is_measured_again(pytester: pytest.Pytester) -> None:
    """Claims older than their source, those of a test that failed, and no others; none at all is success."""
    pytester.makepyfile(lower="OURS = 1.", lower_test=PAPER)

    def run(**outcome: int) -> int:
        result = pytester.runpytest("-p", "hf_quant.testing.fixtures", "--claims", "kept", "lower_test.py")
        result.assert_outcomes(**outcome)
        return int(result.ret)

    assert run(passed=2, deselected=1) == 0
    assert run(deselected=3) == 0
    pytester.makepyfile(lower="OURS = 1.500")
    assert run(passed=2, deselected=1) == 0
    assert read(pytester.path / "kept" / "m.json")[1].figures["ours"] == [1.5] * 3
    pytester.makepyfile(lower="OURS = 1.75")
    assert run(passed=1, failed=1, deselected=1) == 1
    assert run(failed=1, deselected=2) == 1
    pytester.makepyfile(lower="OURS = 3.00000")
    assert run(passed=1, failed=1, deselected=1) == 1
    assert run(failed=1, deselected=2) == 1


def test_a_fingerprint_covers_the_methods_that_a_test_imports() -> None:
    """qera's test imports lorc's, that imports lorc, and that lowrank_core."""
    from hf_quant.testing.sources import covered

    root = Path(__file__).parents[2] / "plugins" / "residual"
    names = {path.name for path in covered(root / "qera_test.py")}
    assert {"qera.py", "qera_test.py", "lorc_test.py", "lorc.py", "lowrank_core.py"} <= names
    assert not names & {"loftq.py", "pipeline.py"}
    assert (
        fingerprint(root / "qera_test.py") == fingerprint(root / "qera_test.py") != fingerprint(root / "lqer_test.py")
    )
