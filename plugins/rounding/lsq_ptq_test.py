"""LSQ after GPTQ, against the whole model's KL. See also `roundings_test.py`."""

import pytest
import torch

from hf_quant.plugins.rounding.lsq_ptq import EDGE, Places, PlacesFake
from hf_quant.qtensor import QTensor
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest

SETTING = {"bits": 2, "group_size": 64}


def start() -> tuple[torch.Tensor, QTensor]:
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    return W, Nearest().solve(W, int_spec(3, 16), AbsMaxRange(), None)


def test_weights_begin_where_they_are_and_no_further_than_the_edge() -> None:
    W, q = start()
    fake = PlacesFake(W, q, 1e-3, 1e-3)
    codes = q.spec.grid.decode(q.codes)
    away = (fake.U.detach() - codes).abs()
    assert away.max() <= EDGE + 1e-6
    assert 0.1 < away.mean() < 0.4  # the float weight, not the middle of the code


def test_gradients_are_those_of_the_formula() -> None:
    """dL/dU = s dL/dW^; dL/dr = s (round(U) - z) dL/dW^, summed over the group."""
    W, q = start()
    fake = PlacesFake(W, q, 1e-3, 1e-3)
    g = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    (fake(W) * g).sum().backward()
    s = q.scale.repeat_interleave(16, 1)
    assert q.zero is not None
    value = q.spec.grid.decode(q.codes) - q.zero.repeat_interleave(16, 1)
    inside = (fake.U.detach() >= 0) & (fake.U.detach() <= 7)
    assert fake.U.grad is not None
    assert fake.r.grad is not None
    assert torch.allclose(fake.U.grad, s * g * inside, rtol=1e-5)
    assert torch.allclose(fake.r.grad, (s * value * g).reshape(8, 2, 16).sum(-1), rtol=1e-4, atol=1e-5)


def test_what_has_no_learning_rate_stays() -> None:
    W, q = start()
    generator = torch.Generator()
    assert [p.shape for p, _ in Places(lr=0.0).start(W, q, generator).learned()] == [q.scale.shape]
    assert [p.shape for p, _ in Places(scale_lr=0.0).start(W, q, generator).learned()] == [W.shape]


def test_claim_in_few_steps(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """On held-out text."""
    ours, gptq = judge.kl("lsq-ptq", steps=24, **SETTING), judge.kl("gptq", **SETTING)
    claims.order("lsq-ptq", "KL below gptq's, 2 bits in groups of 64, 24 steps", ours=[ours], theirs=[gptq])


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """At the default number of steps, over three calibration sets that share nothing."""
    for bits in (2, 3):
        setting = {"bits": bits, "group_size": 64}
        ours, gptq = ([judge.kl(m, seed=seed, **setting) for seed in range(3)] for m in ("lsq-ptq", "gptq"))
        claims.order("lsq-ptq", f"KL below gptq's, {bits} bits in groups of 64", ours=ours, theirs=gptq)
