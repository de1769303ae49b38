"""HAWQ-V2: what its allocation gives on a trained model. Its traces are tested in `curvature_test.py`."""

import pytest

SEEDS = range(3)


@pytest.mark.slow
def test_claim(claims, distance, at_three_bits) -> None:  # type: ignore[no-untyped-def]
    """From 2, 3, 4 and 8 bits, all rounded to nearest in searched ranges."""
    ours = [distance(at_three_bits("hawq-v2"), seed) for seed in SEEDS]
    for other in ("uniform", "hawq"):
        theirs = [distance(at_three_bits(other), seed) for seed in SEEDS]
        claims.order(
            "hawq-v2", f"KL below that of {other} at the size of 3 bits in groups of 64", ours=ours, theirs=theirs
        )
