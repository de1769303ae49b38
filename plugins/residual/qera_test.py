"""QERA: no other low-rank term has a smaller output error; on a trained model that shows."""

import pytest

from hf_quant.plugins.residual.lorc import LowRankRepair
from hf_quant.plugins.residual.lorc_test import SETTING, problem
from hf_quant.plugins.residual.qera import Autocorrelation, RootMeanSquare


def test_invariant_output_error(claims) -> None:
    W, q, stats, x = problem()
    E = W - q.dequantize()
    plain, approximate, exact = (
        float((x @ (E - LowRankRepair(8, w).repair(W, q, stats)[0].matrix()).T).square().sum())
        for w in (LowRankRepair().weighting, RootMeanSquare(), Autocorrelation())
    )
    figures = {"exact": exact, "approximate": approximate, "plain": plain}
    claims.invariant("qera", "output error exact <= approximate <= plain SVD", exact <= approximate <= plain, figures)


@pytest.mark.slow
def test_order_at_most_lqer_at_most_lorc(judge, claims) -> None:
    kl = {m: [judge.kl(m, seed=s, rank=16, **SETTING) for s in range(3)] for m in ("qera", "lqer", "lorc")}
    claims.order("qera", "KL exact at most lqer's, 3 bits, rank 16 (tiny-lm)", ours=kl["qera"], theirs=kl["lqer"])
    claims.order("qera", "KL exact at most lorc's, 3 bits, rank 16 (tiny-lm)", ours=kl["qera"], theirs=kl["lorc"])
    claims.order("lqer", "KL at most lorc's, 3 bits, rank 16 (tiny-lm)", ours=kl["lqer"], theirs=kl["lorc"])
