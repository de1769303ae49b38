"""LoftQ: turns lower the weight error, and what that is worth on a trained model."""

import pytest

from hf_quant.plugins.residual.loftq import loftq
from hf_quant.plugins.residual.lorc import lorc


def test_invariant_turns_never_hurt(judge, claims) -> None:
    W = judge.model().model.layers[2].mlp.up_proj.weight.detach()

    def error(recipe) -> float:
        q = recipe.solver.solve(W, recipe.weights, recipe.range, None)
        return float((W - q.dequantize() - recipe.repairs[0].repair(W, q, {})[0].matrix()).square().sum())

    errors = [error(lorc(2, 32, 16)), *(error(loftq(2, 32, 16, turns)) for turns in (1, 2, 5))]
    falls = errors[0] == errors[1] and errors[1] > errors[2] >= errors[3]
    claims.invariant("loftq", "one turn is lorc; more lower ||W - Q - L|| (2 bits)", falls, {"errors": errors})


@pytest.mark.slow
def test_order_below_lorc(judge, claims) -> None:
    setting = {"bits": 2, "group_size": 32, "rank": 16}
    ours, theirs = [judge.kl("loftq", **setting)] * 3, [judge.kl("lorc", **setting)] * 3
    claims.order("loftq", "KL below lorc's, 2 bits in groups of 32, rank 16 (tiny-lm)", ours=ours, theirs=theirs)
