"""SmoothQuant's proposal on a synthetic layer: the formula, the function kept, W8A8 error down."""

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.plugins.transforms.smoothquant import Smooth
from hf_quant.qtensor import nearest
from hf_quant.runtime.activation import quantize_input
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stats import AbsMax, Seen

WEIGHTS, INPUTS, FIT = int_spec(8, -1, symmetric=True), act_spec(8), AbsMaxRange()


def outlier_layer() -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g)
    x[:, [5, 40]] *= 60
    return x, [torch.randn(n, 64, generator=g) for n in (32, 16)]


def proposal(alpha: float, x: Tensor, Ws: list[Tensor]) -> Tensor:
    state = AbsMax().start(64, x.device)
    AbsMax().update(state, Seen(x))
    found = Smooth(alpha).propose(Ws, {AbsMax(): state}, WEIGHTS, INPUTS, FIT)
    assert found is not None
    return found.s_K


def error(x: Tensor, Ws: list[Tensor]) -> float:
    q = quantize_input(x, INPUTS, {}).dequantize()
    rounded = [nearest(W, *FIT.fit(W, WEIGHTS), WEIGHTS).dequantize() for W in Ws]
    return sum(float((x @ W.T - q @ R.T).square().sum()) for W, R in zip(Ws, rounded, strict=True))


def test_inputs_and_weights_end_up_equally_hard_and_the_error_falls() -> None:
    x, Ws = outlier_layer()
    s = proposal(0.5, x, Ws)
    smooth, heavier = x / s, [W * s for W in Ws]
    for W, V in zip(Ws, heavier, strict=True):
        assert torch.allclose(smooth @ V.T, x @ W.T, atol=1e-3)
    assert torch.allclose(smooth.abs().amax(0), torch.stack([W.abs().amax(0) for W in heavier]).amax(0))
    assert error(smooth, heavier) < 0.2 * error(x, Ws)


def test_the_ends_of_alpha() -> None:
    x, Ws = outlier_layer()
    largest = torch.cat(Ws).abs().amax(0)
    assert torch.allclose(x.abs().amax(0) / proposal(1.0, x, Ws), torch.ones(64))
    assert torch.allclose(largest * proposal(0.0, x, Ws), torch.ones(64))
    with pytest.raises(ConfigError, match="alpha"):
        Smooth(1.5)


def test_silent_channels_keep_their_scale() -> None:
    x, Ws = outlier_layer()
    x[:, 7] = 0
    for W in Ws:
        W[:, 9] = 0
    s = proposal(0.5, x, Ws)
    assert s[[7, 9]].eq(1).all()
    assert s.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("static", "plain"), [(False, "dynamic-w8a8"), (True, "int8-default")])
def test_claim(judge, claims, static: bool, plain: str) -> None:  # type: ignore[no-untyped-def]
    """On a model with outlier channels, smoothing lowers the KL of W8A8 whichever way inputs are scaled."""
    claims.order(
        "smoothquant",
        f"KL below that of {plain}, W8A8, tiny-lm with outlier channels",
        ours=judge.kls("smoothquant", static=static, outliers=True),
        theirs=judge.kls(plain, outliers=True),
        factor=0.8,
    )
