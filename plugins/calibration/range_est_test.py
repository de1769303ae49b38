"""The estimated range against min-max, a dense grid, and brute force over both ends."""

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import IntGrid
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.calibration.range_est import GoldenRange, range_est
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.range import AbsMaxRange, Range

SPECS = [int_spec(4, 32), int_spec(3, -1), int_spec(2, 48, symmetric=True), range_est(4, 50, power=0.6).weights]


def weights() -> Tensor:
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    return x * x.abs().sqrt()


def group_errors(W: Tensor, spec: Spec, fit: Range, c: Tensor | None = None) -> Tensor:
    error = (W - nearest(W, *fit.fit(W, spec, c), spec).dequantize()).square()
    return as_blocks(error if c is None else error * c, spec).sum(-1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("importance", [False, True])
def test_no_worse_than_min_max_or_a_dense_search(claims, spec: Spec, importance: bool) -> None:  # type: ignore[no-untyped-def]
    """Every group against min-max; with equal steps, all together against 100 shrink ratios, to a thousandth."""
    W, c = weights(), torch.linspace(0.1, 3, 200) if importance else None
    ours, extremes = (group_errors(W, spec, fit, c) for fit in (GoldenRange(), AbsMaxRange()))
    holds = bool((ours <= extremes * 1.00001).all())
    if isinstance(spec.grid, IntGrid):
        holds &= float(ours.sum()) <= float(group_errors(W, spec, MseClip(100, 0.3, 2.0), c).sum()) * 1.001
    statement = f"error at most min-max's and a 100-point search's: {type(spec.grid).__name__}, {spec.grid.bits} bits"
    claims.invariant("range-est", statement + " with importance" * importance, holds)


def test_both_ends_are_near_the_best_pair() -> None:
    W, spec = weights()[:8, :64], int_spec(3, 64)
    low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    best = torch.full((8,), torch.inf)
    for a in torch.linspace(0.3, 1, 71).tolist():
        for b in torch.linspace(0.3, 1, 71).tolist():
            q = nearest(W, *from_extremes(low * a, high * b, spec), spec)
            best = torch.minimum(best, (W - q.dequantize()).square().sum(1))
    found = group_errors(W, spec, GoldenRange())[:, 0]
    assert (found <= best * 1.1).all()
    assert found.sum() <= best.sum() * 1.04


def test_companded_levels_suit_heavy_tails() -> None:
    spec = range_est(4, 50, power=0.6).weights
    assert spec.grid.decode(torch.tensor([0, 7, 8, 15])).sign().tolist() == [-1, -1, 1, 1]
    plain = group_errors(weights() ** 3, int_spec(4, 50, symmetric=True), GoldenRange()).sum()
    assert group_errors(weights() ** 3, spec, GoldenRange()).sum() < 0.8 * plain


def test_bad_arguments_and_zero_weights() -> None:
    for bad in ({"points": 2}, {"floor": 0.0}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError):
            GoldenRange(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="power"):
        range_est(power=1.5)
    scale, zero = GoldenRange().fit(torch.zeros(4, 32), int_spec(4, 32))
    assert nearest(torch.zeros(4, 32), scale, zero, int_spec(4, 32)).dequantize().eq(0).all()


def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Without data there is one figure, whatever the seed."""
    setting = {"bits": 4, "group_size": -1}
    ours, theirs = judge.kl("range-est", **setting), judge.kl("rtn", **setting)
    claims.order("range-est", "KL no higher than min-max's, 4 bits, a row a scale", ours=[ours], theirs=[theirs])
