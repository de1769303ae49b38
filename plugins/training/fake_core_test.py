"""What every trained rounding owes: begins at the solver's codes, and exports to the bit what it computes."""

import pytest
import torch

from hf_quant.plugins.diffusion.efficientdm import MergedLora, Single
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.training.l4q import L4q
from hf_quant.plugins.training.lr_qat import LrQat
from hf_quant.plugins.training.lsq import Lsq
from hf_quant.plugins.training.qlora import Qlora
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.fakequant import Clipped, Straight
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange

ROUNDINGS = [
    Lsq(),
    LrQat(rank=4),
    LrQat(rank=4, frozen="float32"),
    L4q(rank=4),
    Qlora(rank=4),
    MergedLora(4, Single(0.01)),
]
SPECS = [
    int_spec(2, 16),
    int_spec(3, 20),
    int_spec(4, -1, symmetric=True),
    int_spec(8, 32),
    int_spec(3, 48, scale="float16"),
]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: f"{type(r).__name__}-{getattr(r, 'frozen', '')}")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.grid.bits}-{s.block[1]}")
def test_begins_at_the_codes_and_exports_what_it_computes(rounding, spec: Spec) -> None:
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 48, generator=g), torch.randn(300, 48, generator=g)
    q = Gptq().solve(W, spec, AbsMaxRange(), Quadratic(x.T @ x))
    fake = rounding.start(W, q, g)
    assert rounding.refuses(spec) is None
    begun = fake.export(W)
    assert torch.equal(begun.codes, q.codes)
    assert torch.equal(begun.dequantize(), q.dequantize())
    optimizer = torch.optim.Adam([{"params": [p], "lr": 3e-2} for p, _ in fake.learned()])
    target = torch.randn(24, 48, generator=g)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (fake(W) - target).square().mean()
        loss.backward()
        optimizer.step()
        fake.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    out = fake.export(W)
    assert {id(p) for p, _ in fake.learned()} == {id(p) for p in fake.parameters()}
    if fake.branch() is None:
        assert torch.equal(out.dequantize(), fake(W))
        assert not torch.equal(out.codes, q.codes)
    else:
        assert torch.equal(out.codes, q.codes)
        assert torch.allclose(out.dequantize() + fake.branch().matrix(), fake(W), atol=1e-5)


def test_estimators() -> None:
    x = torch.tensor([-3.0, 0.4, 0.6, 9.0], requires_grad=True)
    for estimator, gradient in ((Clipped(), [0.0, 1.0, 1.0, 0.0]), (Straight(), [1.0, 1.0, 1.0, 1.0])):
        y = estimator.round(x, 0, 3)
        assert y.tolist() == [0, 0, 1, 3]
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.tolist() == gradient


def test_what_cannot_be_trained_is_refused() -> None:
    assert "integer grids" in str(Lsq().refuses(Spec(grid=act_spec().scale)))
