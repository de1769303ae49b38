"""SpinQuant: orthogonal at every step, the loss falls, and what it gives on a model with outlier channels."""

import pytest
import torch
from torch import Tensor

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.plugins.transforms.spinquant import LearnedRotations, cayley_sgd


def test_steps_stay_orthogonal_and_find_the_rotation(claims) -> None:  # type: ignore[no-untyped-def]
    """Towards a matrix given: the distance falls by far, and R^T R = I throughout."""
    g = torch.Generator().manual_seed(0)
    target = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    start = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    target = target * (torch.linalg.det(target) * torch.linalg.det(start)).sign()  # of one component (16 is even ...)
    target[0] *= (torch.linalg.det(target) * torch.linalg.det(start)).sign()  # ... so one row decides

    def distance(Rs: list[Tensor], _: int) -> Tensor:
        return (Rs[0] - target).square().sum()

    (R,) = cayley_sgd([start], distance, steps=300, lr=0.2, momentum=0.5)
    off = float((R @ R.T - torch.eye(16)).abs().max())
    claims.invariant("spinquant", "rotations stay orthogonal to 1e-5", off < 1e-5, {"off": off})
    assert float(distance([R.float()], 0)) < 0.05 * float(distance([start], 0))


def test_learned_rotations_leave_the_float_model_as_it_is(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """With 8 bits all over, what is left is rounding; the rotations themselves change nothing."""
    model = judge.model(outliers=True)
    config = QuantConfig("spinquant", bits=8, act_bits=8, steps=2, solver="rtn")
    hf_quant.quantize(model, config, data=judge.data(0)[:2], progress=False)
    with torch.no_grad():
        log_q = model(judge.test[:4]).logits.log_softmax(-1)
    expected = judge.expected[:4]
    kl = float((expected.exp() * (expected - log_q)).sum(-1).mean())
    claims.invariant("spinquant", "W8A8 after learned rotations: KL below 1e-3", kl < 1e-3, {"KL": kl})


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """W4A4 with outlier channels, three calibration sets: learned rotations against random ones."""
    ours = [judge.kl("spinquant", outliers=True, seed=seed) for seed in range(3)]
    theirs = [judge.kl("quarot", outliers=True, seed=seed) for seed in range(3)]
    claims.order("spinquant", "W4A4, outlier channels: KL below quarot's", ours=ours, theirs=theirs)


def test_arguments() -> None:
    for wrong in ({"steps": 0}, {"lr": 2.0}, {"momentum": 1.0}):
        with pytest.raises(ConfigError, match="at least one step"):
            LearnedRotations(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="solver"):
        QuantConfig("spinquant", solver="magic")
