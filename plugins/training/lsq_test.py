"""LSQ on a trained model."""

import pytest
import torch

from hf_quant.plugins.training.fake_core import scaled_gradient
from hf_quant.plugins.training.lr_qat_test import SHORT, TWO


def test_invariant_gradient_of_the_step_size(judge, claims) -> None:
    """The derivative of LSQ's formula: `round(v) - v` inside, the bound outside, times the normalization."""
    from hf_quant.plugins.training.lsq import Lsq
    from hf_quant.runtime.packed import refit
    from hf_quant.spec import int_spec

    g = torch.Generator().manual_seed(0)
    W = torch.randn(8, 32, generator=g)
    q = refit(W, int_spec(3, 32, symmetric=True, scale="float32"))
    fake = Lsq().start(W, q, g)
    with torch.no_grad():
        fake.ratio.mul_(0.6)  # some values are clipped then
    fake(W).sum().backward()
    v = fake.weight.detach() / fake.ratio.detach()
    inside = (v >= -4) & (v <= 3)
    want = torch.where(inside, v.round() - v, v.round().clamp(-4, 3)).sum(1, keepdim=True) / (32 * 3) ** 0.5
    holds = torch.allclose(fake.ratio.grad / q.scale, want, atol=1e-4) and torch.equal(fake.weight.grad != 0, inside)
    claims.invariant("lsq", "gradients of step and weight are those of the paper", holds)


@pytest.mark.slow
def test_claim(judge, claims) -> None:
    ours, theirs = judge.kls("lsq", **TWO, **SHORT), judge.kls("gptq-refined", coherent=4.0, **TWO)
    statement = "KL at most 0.9 of gptq-refined's, where it begins, after 20 steps of 4 windows, 2 bits (tiny-lm)"
    claims.order("lsq", statement, ours=ours, theirs=theirs, factor=0.9, reproduced=False)


def test_scaled_gradient() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    y = scaled_gradient(x, 0.25)
    y.backward()
    assert float(y.detach()) == 2.0
    assert float(x.grad) == 0.25
