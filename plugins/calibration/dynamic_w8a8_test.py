"""Dynamic W8A8 on a trained model with the outlier channels of large ones."""

import pytest


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """A scale for each token beats one for all, and costs little in absolute terms without outliers."""
    claims.order(
        "dynamic-w8a8",
        "KL below that of static ranges (int8-default), W8A8, tiny-lm with outlier channels",
        ours=judge.kls("dynamic-w8a8", outliers=True),
        theirs=judge.kls("int8-default", outliers=True),
        factor=0.8,
    )
    assert judge.kl("dynamic-w8a8") < 0.005
