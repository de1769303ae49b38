"""HAWQ: what its allocation gives on a trained model. Its eigenvalues are tested in `curvature_test.py`."""

import pytest

SEEDS = range(3)


@pytest.mark.slow
def test_claim(claims, distance, at_three_bits) -> None:  # type: ignore[no-untyped-def]
    ours = [distance(at_three_bits("hawq"), seed) for seed in SEEDS]
    theirs = [distance(at_three_bits("uniform"), seed) for seed in SEEDS]
    statement = "KL at most that of a uniform allocation of equal size, 3 bits in groups of 64"
    claims.order("hawq", statement, ours=ours, theirs=theirs, reproduced=False)
