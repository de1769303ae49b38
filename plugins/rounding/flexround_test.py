"""FlexRound: its formula, where it begins, and its claims on a trained model. See also `roundings_test.py`."""

from dataclasses import replace

import pytest
import torch

from hf_quant import QuantConfig
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.plugins.rounding.flexround import FlexRound, FlexRoundFake
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Job, Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.solver import Nearest

ROWS = {"bits": 4, "group_size": -1}
TENSOR = {"bits": 8, "act_bits": 8, "per_tensor": True}


def start() -> tuple[torch.Tensor, QTensor, FlexRoundFake]:
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    q = Nearest().solve(W, int_spec(3, 16), AbsMaxRange(), None)
    fake = FlexRound().start(W, q, torch.Generator())
    assert isinstance(fake, FlexRoundFake)
    return W, q, fake


def test_invariant_it_begins_at_round_to_nearest(claims) -> None:  # type: ignore[no-untyped-def]
    W, q, fake = start()
    begun = fake.export(W)
    holds = begun.codes.equal(q.codes) and begun.scale.equal(q.scale) and fake(W).equal(q.dequantize())
    claims.invariant("flexround", "before the first step it is round to nearest", holds)


def test_invariant_large_weights_get_large_gradients(claims) -> None:  # type: ignore[no-untyped-def]
    """The reciprocal rule: dW^ / dD = -s W / (s exp(D)) inside the grid, so it grows with the weight."""
    W, q, fake = start()
    D = fake.divisor.D
    with torch.no_grad():
        D.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    fake(W).sum().backward()
    steps = fake.steps().detach()
    inside = (steps >= 0) & (steps <= 7)
    s = q.scale.repeat_interleave(16, 1)
    holds = torch.allclose(D.grad, -s * fake.start * (-D.detach()).exp() * inside, rtol=1e-4, atol=1e-6)
    claims.invariant("flexround", "the gradient of a weight's divisor is proportional to the weight", holds)


def test_a_weight_may_move_by_several_levels() -> None:
    W, q, fake = start()
    with torch.no_grad():
        fake.divisor.D.fill_(-0.7)  # twice as far from zero
    moved = (q.spec.grid.decode(fake.export(W).codes) - q.spec.grid.decode(q.codes)).abs()
    assert moved.max() >= 2


def test_claim_in_few_steps(judge, claims) -> None:  # type: ignore[no-untyped-def]
    ours, rtn = judge.kl("flexround", steps=12, **ROWS), judge.kl("rtn", **ROWS)
    claims.order("flexround", "KL at most 0.7 of rtn's, 4 bits a row, 12 steps", ours=[ours], theirs=[rtn], factor=0.7)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """At equal steps, over three calibration sets that share nothing."""
    ours, theirs = (judge.kls(method, steps=100, **ROWS) for method in ("flexround", "adaround"))
    claims.order("flexround", "KL at most adaround's, 4 bits a row, 100 steps", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_claim_one_scale_a_tensor(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """8 bits for weights and static inputs, one step for a matrix, which only the rounding tells apart."""

    def kl(rounding: AdaRound | FlexRound, seed: int) -> float:
        model, how = judge.model(), QuantConfig("flexround", **TENSOR).quantizer()
        assert isinstance(how, Recipe)
        assert isinstance(how.tuner, Reconstruction)
        how = replace(how, tuner=replace(how.tuner, rounding=rounding, steps=30))
        how.quantize(model, Job(data=judge.data(seed), seed=seed, progress=False))
        return judge.distance(model)[0]

    ours, theirs = ([kl(rounding, seed) for seed in range(3)] for rounding in (FlexRound(), AdaRound()))
    claims.order("flexround", "KL at most adaround's, W8A8, a step a tensor, 30 steps", ours=ours, theirs=theirs)
