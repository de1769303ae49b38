"""AdaRound: its variables, its penalty, and its claim on a trained model. See also `roundings_test.py`."""

import pytest
import torch

from hf_quant.plugins.rounding.adaround import AdaRoundFake, neighbours
from hf_quant.qtensor import QTensor
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest

SETTING = {"bits": 3, "group_size": 64}


def start(seed: int = 0) -> tuple[torch.Tensor, QTensor]:
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    return W, Nearest().solve(W, int_spec(3, 16), AbsMaxRange(), None)


def test_it_begins_soft_at_the_float_weight() -> None:
    """From the nearest codes h is the part above the lower neighbour, so the soft weight is the float one."""
    W, q = start()
    fake = AdaRoundFake(W, q, 1e-2, 1.0)
    step = q.scale.amax()
    _, at = neighbours(W, q)
    inner = (at > 0.002) & (at < 0.998) & ((at - 0.4999).abs() > 1e-3)
    assert inner.float().mean() > 0.9
    assert ((fake(W) - W).abs() < 1e-4 * step)[inner].all()
    assert set(fake.h().detach().gt(1).unique().tolist()) == {False}


def test_a_code_two_steps_away_stays_where_the_solver_put_it() -> None:
    W, q = start()
    codes = (q.codes.int() + 2).clamp(max=7).to(torch.uint8)
    moved = QTensor(codes, q.scale, q.zero, q.spec, q.shape)
    assert AdaRoundFake(W, moved, 1e-2, 1.0).export(W).codes.equal(codes)


def test_the_penalty_is_flat_first_and_then_drives_to_the_corners() -> None:
    W, q = start()
    fake = AdaRoundFake(W, q, 1e-2, 1.0)
    assert fake.anneal(0.0) is None
    assert fake.anneal(0.19) is None
    soft, sharp = fake.anneal(0.25), fake.anneal(0.95)
    assert soft is not None
    assert sharp is not None
    assert 0 < float(sharp.detach()) < float(soft.detach()) < 1
    assert fake.anneal(1.0) is None
    optimizer = torch.optim.Adam([fake.V], lr=0.05)
    for step in range(400):
        penalty = fake.anneal(0.25 + 0.75 * step / 401)
        optimizer.zero_grad()
        assert penalty is not None
        penalty.backward()
        optimizer.step()
    assert ((fake.h() < 0.01) | (fake.h() > 0.99)).float().mean() > 0.95


def test_claim_in_few_steps(judge, claims) -> None:  # type: ignore[no-untyped-def]
    kl = [judge.kl("adaround", steps=40, **SETTING)]
    claims.order(
        "adaround", "KL below rtn's, 3 bits in groups of 64, 40 steps", ours=kl, theirs=[judge.kl("rtn", **SETTING)]
    )
    assert kl[0] < 0.95 * judge.kl("adaround", steps=0, **SETTING)  # what the learning alone brings


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """At the default number of steps, over three calibration sets that share nothing."""
    kl = [judge.kl("adaround", seed=seed, **SETTING) for seed in range(3)]
    rtn = [judge.kl("rtn", **SETTING)] * 3
    claims.order("adaround", "KL at most 0.7 of rtn's, 3 bits in groups of 64", ours=kl, theirs=rtn, factor=0.7)
