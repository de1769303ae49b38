"""GPTAQ on a trained model. That it equals GPTQ without drift is tested beside the solver (`gptq_test.py`)."""

from statistics import fmean

import pytest

SETTING = {"bits": 3, "group_size": 64}


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Well below rounding to nearest, and over three calibration sets no worse than GPTQ by more than the noise.

    On this model GPTAQ is a few percent better than GPTQ on average; that order is reported, not demanded.
    """
    drifted, plain = (judge.kls(method, **SETTING) for method in ("gptaq", "gptq"))
    rounded = judge.kls("rtn", **SETTING)
    claims.order("gptaq", "KL below rtn's, w3g64, tiny-lm", ours=drifted, theirs=rounded, factor=0.8)
    assert fmean(drifted) < 1.05 * fmean(plain)
    assert drifted != plain
