"""AWQ's proposal on a synthetic layer: the exact loss, the best exponent, the function kept."""

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.plugins.transforms.awq import ActivationAware, ClippedNearest
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stats import Gram, Moments, Seen, Stat, State

SPEC, FIT = int_spec(3, 32), AbsMaxRange()


def salient_inputs(K: int = 128, tokens: int = 512) -> Tensor:
    """A few channels much larger than the others, as in large language models."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=g)
    x[:, torch.randperm(K, generator=g)[: K // 16]] *= 12
    return x


def stats_of(x_TK: Tensor) -> dict[Stat, State]:
    states: dict[Stat, State] = {s: s.start(x_TK.shape[1], x_TK.device) for s in ActivationAware.needs}
    for stat, state in states.items():
        for part in x_TK.split(100):
            stat.update(state, Seen(part))
    return states


def weights(K: int = 128) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, K, generator=g) for n in (24, 8)]


def output_error(Ws: list[Tensor], s_K: Tensor, x_TK: Tensor) -> float:
    """What the paper minimizes, by running the samples."""
    total = 0.0
    for W in Ws:
        q = nearest(W * s_K, *FIT.fit(W * s_K, SPEC), SPEC).dequantize() / s_K
        total += float((x_TK @ (W - q).T).square().sum())
    return total


def test_salient_channels_are_scaled_up_and_the_output_error_falls() -> None:
    x, Ws = salient_inputs(), weights()
    proposal = ActivationAware().propose(Ws, stats_of(x), SPEC, None, FIT)
    assert proposal is not None
    large = x.abs().mean(0) > 5
    assert proposal.s_K[large].min() > 1.5 * proposal.s_K[~large].max()
    assert output_error(Ws, proposal.s_K, x) < 0.6 * output_error(Ws, torch.ones(128), x)


def test_the_loss_is_exactly_that_of_running_the_samples() -> None:
    x, Ws, s_K = salient_inputs(), weights(), torch.linspace(0.5, 2, 128)
    H_KK = 2 / len(x) * x.T @ x
    assert ActivationAware.loss(Ws, s_K, H_KK, SPEC, FIT) == pytest.approx(
        2 / len(x) * output_error(Ws, s_K, x), rel=1e-4
    )


def test_no_other_exponent_is_better() -> None:
    x, Ws = salient_inputs(), weights()
    proposal = ActivationAware().propose(Ws, stats_of(x), SPEC, None, FIT)
    assert proposal is not None
    mean = x.abs().mean(0)
    unit = mean / mean.log().mean().exp()
    least = min(output_error(Ws, unit.pow(a / 20), x) for a in range(21))
    assert output_error(Ws, proposal.s_K, x) == pytest.approx(least, rel=1e-3)


def test_inputs_alike_in_size_are_left_alone() -> None:
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).sign()
    assert ActivationAware().propose(weights(), stats_of(x), SPEC, None, FIT) is None


def test_a_channel_without_input_gets_a_finite_scale() -> None:
    x = salient_inputs()
    x[:, 3] = 0
    proposal = ActivationAware().propose(weights(), stats_of(x), SPEC, None, FIT)
    assert proposal is not None
    assert proposal.s_K.isfinite().all()
    assert proposal.s_K.gt(0).all()


def test_statistics_and_arguments() -> None:
    assert ActivationAware.needs == (Gram(), Moments())
    with pytest.raises(ConfigError, match="steps"):
        ActivationAware(steps=0)


def test_clipping_is_the_best_ratio_of_every_group() -> None:
    """Against samples run through each group alone, ratio by ratio."""
    x, W, spec = salient_inputs(), weights()[0], int_spec(3, 48)
    found = ClippedNearest(steps=6).solve(W, spec, FIT, Quadratic(2 / len(x) * x.T @ x))
    blocks = as_blocks(W, spec)
    for g in range(3):
        columns = slice(48 * g, min(48 * g + 48, 128))
        ours = (x[:, columns] @ (W - found.dequantize())[:, columns].T).square().sum(0)
        tried = []
        for ratio in torch.linspace(1, 0.5, 6).tolist():
            low, high = (ratio * t(-1)[:, g : g + 1] for t in (blocks.amin, blocks.amax))
            q = nearest(W[:, columns], *from_extremes(low, high, spec), spec)
            tried.append((x[:, columns] @ (W[:, columns] - q.dequantize()).T).square().sum(0))
        assert torch.allclose(ours, torch.stack(tried).amin(0), rtol=1e-3)


def test_without_statistics_nothing_is_clipped() -> None:
    W = weights()[0]
    q, n = ClippedNearest().solve(W, SPEC, FIT, None), nearest(W, *FIT.fit(W, SPEC), SPEC)
    assert q.codes.equal(n.codes)
    assert q.scale.equal(n.scale)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """KL below rounding's; clipping does most of it on a small model, which has no outliers to scale."""
    setting = {"bits": 3, "group_size": 64}
    ours, theirs = (judge.kls(method, **setting) for method in ("awq", "rtn"))
    claims.order("awq", "KL below rtn's, w3g64, tiny-lm", ours=ours, theirs=theirs, factor=0.95)


@pytest.mark.slow
def test_scaling_alone_undoes_outliers(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """The paper's point without the clipping: large inputs need fine steps."""
    setting = {"bits": 3, "group_size": 64, "outliers": True}
    ours, theirs = judge.kls("awq", clip_steps=1, **setting), judge.kls("rtn", **setting)
    claims.order(
        "awq",
        "scaling alone, without clipping: KL below rtn's, w3g64, tiny-lm with outlier channels",
        ours=ours,
        theirs=theirs,
        factor=0.8,
    )
