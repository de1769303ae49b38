"""SVDQuant: branch and rest are the weight, rounds never hurt, and the order of its parts with outlier channels."""

from statistics import fmean

import pytest
import torch
from torch import Tensor

from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.plugins.residual.svdquant import ROWS, LowRankSplit, SearchedSmoothing, output_error, svdquant
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stats import AbsMax, Seen, Stat, State

RECIPE, FIT = svdquant(), AbsMaxRange()
SPECS = RECIPE.weights, RECIPE.inputs


def layer() -> tuple[list[Tensor], Tensor, dict[Stat, State]]:
    """Two weights that share inputs with outlier channels."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 128, generator=g)
    x[:, [3, 70, 99]] *= 40
    Ws = [torch.randn(n, 128, generator=g) * 0.05 for n in (96, 64)]
    stats = {s: s.start(128, x.device) for s in (AbsMax(), ROWS)}
    for stat, state in stats.items():
        stat.update(state, Seen(x))
    return Ws, x, stats


def test_branch_and_rest_are_the_weight(claims) -> None:  # type: ignore[no-untyped-def]
    Ws, _, stats = layer()
    found = LowRankSplit(16).split(Ws, stats, *SPECS, FIT)
    away = max(
        float((W - rest - low.matrix()).abs().max() / W.abs().max())
        for W, (rest, (low,)) in zip(Ws, found, strict=True)
    )
    lows = [low for _, (low,) in found]
    assert lows[0].down_RK is lows[1].down_RK
    assert all(t.equal(t.bfloat16().float()) for low in lows for t in low.tensors)
    claims.invariant("svdquant", "L + R = W, to float32's rounding", away < 1e-6, {"away": away})


def test_more_rounds_are_never_worse_and_rank_helps(claims) -> None:  # type: ignore[no-untyped-def]
    Ws, x, stats = layer()
    W, plain = torch.cat(Ws), output_error(torch.cat(Ws), None, x, *SPECS, FIT)[0]
    errors = []
    for rounds in (1, 3, 100):
        rests = LowRankSplit(16, rounds).split(Ws, stats, *SPECS, FIT)
        low = torch.cat([b.matrix() for _, (b,) in rests])
        R = W - low
        errors.append(output_error(R, None, x, *SPECS, FIT)[0])
    claims.invariant(
        "svdquant",
        "the output error falls with a branch, and never rises with rounds",
        plain > errors[0] and errors[0] >= errors[1] * (1 - 1e-4) and errors[1] >= errors[2] * (1 - 1e-4),
        {"without": plain, "rounds 1, 3, 100": errors},
    )


def test_smoothing_is_the_best_exponent() -> None:
    Ws, x, stats = layer()
    W = torch.cat(Ws)
    found = SearchedSmoothing().online(Ws, stats, *SPECS, FIT)
    assert found is not None
    least = output_error(W, None, x, *SPECS, FIT)[0]
    ours = output_error(W * found.s_K, None, x / found.s_K, *SPECS, FIT)[0]
    for a in range(21):
        s = x.abs().amax(0).pow(a / 20) / W.abs().amax(0).pow(1 - a / 20)
        least = min(least, output_error(W * s, None, x / s, *SPECS, FIT)[0])
    assert ours == pytest.approx(least, rel=1e-4)


def test_one_seed(judge) -> None:  # type: ignore[no-untyped-def]
    setting = {"outliers": True, "steps": 0}
    assert judge.kl("svdquant", rank=16, rounds=1, **setting) < judge.kl("svdquant", rank=0, **setting)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """W4A4 in groups of 64 with outlier channels, three calibration sets: all of it < smoothing alone < rounding."""
    ours, smooth = judge.kls("svdquant", outliers=True), judge.kls("svdquant", rank=0, outliers=True)
    plain = [judge.kl("svdquant", rank=0, steps=0, outliers=True)] * 3
    setting = "w4a4 g64, tiny-lm with outlier channels"
    claims.order("svdquant", f"{setting}: KL below smoothing's alone", ours=ours, theirs=smooth)
    claims.order("svdquant", f"{setting}: smoothing's KL below rtn's", ours=smooth, theirs=plain)


@pytest.mark.slow
def test_a_branch_is_worth_more_than_its_bytes_in_scales(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """In bfloat16 rank 32 takes 3.17 bits a weight of tiny-lm (more than half of 32 numbers a row of 256): g64 and the
    branch are 3.42 bits beside the codes, groups of 4 are 4."""
    ours, theirs = judge.kls("svdquant", outliers=True), judge.kls("svdquant", rank=0, group_size=4, outliers=True)
    statement = "w4a4, tiny-lm with outlier channels: KL with rank 32 below that with as many bits in scales (g4)"
    claims.order("svdquant", statement, ours=ours, theirs=theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
def test_claim_on_diffusion(name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Noise to signal, its geometric mean over the steps; where no norm can take the scales, layers divide."""
    judge = diffusion_judges(name)

    def noise(**arguments: int) -> list[float]:
        return [10 ** (-fmean(judge.sqnr("svdquant", seed=seed, **arguments)) / 10) for seed in range(3)]

    ours, smooth, plain = noise(), noise(rank=0), noise(rank=0, steps=0)
    setting = f"w4a4 g64, {name}: noise to signal, geometric mean over the steps, below"
    claims.order("svdquant", f"{setting} smoothing's alone", ours=ours, theirs=smooth)
    claims.order("svdquant", f"{setting} rtn's, by smoothing alone", ours=smooth, theirs=plain)


def test_arguments() -> None:
    for wrong in ({"rank": -1}, {"rounds": 0}, {"steps": -1}, {"solver": "magic"}, {"act_group_size": 0}):
        with pytest.raises(ConfigError):
            QuantConfig("svdquant", **wrong)  # type: ignore[arg-type]
