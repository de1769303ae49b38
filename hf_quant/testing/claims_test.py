"""What counts as reproduced, and that it is kept."""

import json
from pathlib import Path

import pytest

from hf_quant.testing import Claims


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
