"""Ranges that keep the gain: what least error loses of it, what this search keeps, and what that is worth."""

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.plugins.calibration.coherent_clip import CoherentClip
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.spec import int_spec
from hf_quant.stages.range import Range


def values(W: Tensor, fit: Range, bits: int = 2, importance: Tensor | None = None) -> Tensor:
    spec = int_spec(bits, 64)
    return nearest(W, *fit.fit(W, spec, importance), spec).dequantize()


def gain(W: Tensor, Q: Tensor) -> float:
    return float((W * Q).sum() / (W * W).sum())


def normal(seed: int = 0) -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))


def test_without_a_price_it_is_the_search_of_least_error() -> None:
    W, importance = normal(), torch.rand(256, generator=torch.Generator().manual_seed(1))
    for given in (None, importance):
        same = values(W, CoherentClip(coherent=0.0), 3, given), values(W, MseClip(24, 0.5, 2.0), 3, given)
        assert same[0].equal(same[1])


def test_the_dearer_the_more_of_the_gain_is_kept() -> None:
    W = normal()
    kept = [gain(W, values(W, CoherentClip(coherent=price))) for price in (0.0, 1.0, 4.0, 64.0)]
    assert kept == sorted(kept)
    assert kept[0] < 0.9
    assert kept[2] > 0.95
    assert abs(1 - kept[3]) < 0.02


def test_every_group_has_the_least_of_all_candidates() -> None:
    """Against trying every ratio by itself, with importances."""
    W, fit = normal(2), CoherentClip(steps=12, coherent=4.0)
    c = torch.rand(256, generator=torch.Generator().manual_seed(3))

    def price(Q: Tensor) -> Tensor:
        e, w, k = ((M.expand(W.shape)).reshape(64, -1, 64) for M in (W - Q, W, c))
        return (k * e * e).sum(-1) + 4 * (k * w * e).sum(-1).square() / (k * w * w).sum(-1)

    spec, blocks = int_spec(2, 64), as_blocks(W, int_spec(2, 64))
    each = [
        price(nearest(W, *from_extremes(blocks.amin(-1) * r, blocks.amax(-1) * r, spec), spec).dequantize())
        for r in torch.linspace(1, 0.5, 12).tolist()
    ]
    assert torch.allclose(price(values(W, fit, 2, c)), torch.stack(each).amin(0), rtol=1e-4)


def test_edges() -> None:
    assert not values(torch.zeros(2, 128), CoherentClip()).any()
    with pytest.raises(ConfigError, match="coherent"):
        CoherentClip(coherent=-1.0)
    with pytest.raises(ConfigError, match="floor"):
        CoherentClip(floor=0.0)


@pytest.mark.parametrize(("model", "group_size"), [("digits-vit", -1), ("digits-vit", 64), ("tiny-lm", 64)])
def test_claim(model: str, group_size: int, judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Data-free: one seed."""
    setting = {"bits": 2, "group_size": group_size}
    ours = [judges(model).kl("coherent-clip", **setting)]
    for peer in ("mse-clip", "rtn"):
        theirs = [judges(model).kl(peer, **setting)]
        where = f"{model}, 2 bits, " + ("a row a scale" if group_size == -1 else f"groups of {group_size}")
        claims.order("coherent-clip", f"KL at most 0.9 of {peer}'s, {where}", ours=ours, theirs=theirs, factor=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "factor"), [(2, 0.9), (3, 1.0), (4, 1.0)])
@pytest.mark.parametrize("solver", ["gptq", "gptaq"])
def test_claim_under_a_solver(solver: str, bits: int, factor: float, judge, claims) -> None:  # type: ignore[no-untyped-def]
    """What a solver starts in matters too: its own ranges are those of least error, weighed by the inputs."""
    setting = {"bits": bits, "group_size": 64}
    ours, theirs = (judge.kls(solver, coherent=price, **setting) for price in (4.0, 0.0))
    most = "" if factor == 1 else f" {factor} of"
    statement = f"{solver} in these ranges: KL at most{most} that in ranges of least error, tiny-lm, w{bits}g64"
    claims.order("coherent-clip", statement, ours=ours, theirs=theirs, factor=factor)
