"""LQER against LoRC, on a trained model whose activations have outliers."""

import pytest
import torch

from hf_quant.plugins.residual.lorc import LowRankRepair
from hf_quant.plugins.residual.lorc_test import SETTING, problem
from hf_quant.plugins.residual.lqer import MeanAbs
from hf_quant.stats import Moments


def test_invariant_least_error_under_its_scaling(claims) -> None:
    W, q, stats, _ = problem()
    S = stats[Moments()]["abs"]
    E = W - q.dequantize()

    def error(weighting: LowRankRepair) -> float:
        return float(((E - weighting.repair(W, q, stats)[0].matrix()) * S).square().sum())

    ours, plain = error(LowRankRepair(8, MeanAbs())), error(LowRankRepair(8))
    best = float(torch.linalg.svdvals(E * S)[8:].square().sum())
    claims.invariant("lqer", "scaled error is the least there is", abs(ours / best - 1) < 1e-4 and ours < plain)


@pytest.mark.slow
def test_order_at_most_lorc(judge, claims) -> None:
    ours = [judge.kl("lqer", seed=s, rank=16, outliers=True, **SETTING) for s in range(3)]
    theirs = [judge.kl("lorc", rank=16, outliers=True, **SETTING)] * 3
    claims.order("lqer", "KL at most lorc's, 3 bits, rank 16 (tiny-lm with outliers)", ours=ours, theirs=theirs)
