"""COMQ: every step lowers the error; scales are those of the paper's formula; greedy order; a trained model."""

import itertools

import pytest
import torch

from hf_quant.errors import ConfigError
from hf_quant.plugins.rounding.comq import GreedyDescent, ShrunkenExtremes, sweep_rows
from hf_quant.plugins.rounding.descent_core import refit_scales
from hf_quant.qtensor import QTensor
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error, same


def test_no_step_raises_the_error(claims) -> None:  # type: ignore[no-untyped-def]
    """Coordinate by coordinate: one column of the order at a time, each row its own weight; then the scales."""
    W, H, _ = correlated_layer(12, 80)
    quadratic, q = Quadratic(H), Nearest().solve(W, int_spec(3), ShrunkenExtremes(), None)
    order = (W.abs() * H.diagonal().sqrt()).argsort(dim=1, descending=True, stable=True)
    errors = [output_error(W, q, quadratic)]
    for j in range(80):
        codes = sweep_rows(W, q, quadratic, order[:, j : j + 1])
        q = QTensor(codes, q.scale, q.zero, q.spec, q.shape)
        errors.append(output_error(W, q, quadratic))
    q = refit_scales(W, q, quadratic)
    errors.append(output_error(W, q, quadratic))
    falls = all(b <= a * 1.000001 for a, b in itertools.pairwise(errors)) and errors[-1] < 0.5 * errors[0]
    claims.invariant("comq", "the error is monotone over coordinate steps and scales", falls, {"errors": errors})


def test_the_scale_of_a_row_is_the_papers() -> None:
    W, H, _ = correlated_layer(8, 60, seed=1)
    q = Nearest().solve(W, int_spec(3), ShrunkenExtremes(), None)
    assert q.zero is not None
    V = q.spec.grid.decode(q.codes) - q.zero
    best = ((W @ H) * V).sum(1) / ((V @ H) * V).sum(1)
    assert torch.allclose(refit_scales(W, q, Quadratic(H)).scale[:, 0], best, rtol=1e-2)


def test_greedy_is_no_worse_than_cyclic_on_average(claims) -> None:  # type: ignore[no-untyped-def]
    """After one sweep; the orders differ by less than 2 % either way once both have converged."""
    ours, theirs = [], []
    for seed in range(3):
        W, H, _ = correlated_layer(256, 96, seed=seed)
        solvers = (GreedyDescent(1, greedy) for greedy in (True, False))
        qs = [s.solve(W, int_spec(4), ShrunkenExtremes(), Quadratic(H)) for s in solvers]
        ours, theirs = ([*kept, output_error(W, q, Quadratic(H))] for kept, q in zip((ours, theirs), qs, strict=True))
    claims.order(
        "comq", "greedy order no worse than cyclic, one sweep, synthetic layers, 4 bits", ours=ours, theirs=theirs
    )


def test_edges() -> None:
    W, H, _ = correlated_layer(8, 96, seed=2)
    spec, fit = int_spec(4, 32), AbsMaxRange()
    assert same(GreedyDescent().solve(W, spec, fit, Quadratic(H * 0)), Nearest().solve(W, spec, fit, None))
    H[::5], H[:, ::5] = 0, 0
    q = GreedyDescent().solve(W, spec, fit, Quadratic(H)).dequantize()
    assert not q[:, ::5].any()
    assert q.isfinite().all()
    with pytest.raises(ConfigError, match="sweeps"):
        GreedyDescent(0)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """The paper's models are vision transformers; here the trained language model is the judge."""
    setting = {"bits": 4, "group_size": -1}
    ours = [judge.kl("comq", seed=seed, **setting) for seed in range(3)]
    theirs = [judge.kl("rtn", **setting)] * 3
    claims.order("comq", "KL at most 0.7 of rtn's, 4 bits, a row a scale", ours=ours, theirs=theirs, factor=0.7)
