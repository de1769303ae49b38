"""Coordinate descent against a plain float64 transcription; scales against a solver of least squares."""

import itertools

import pytest
import torch

from hf_quant.plugins.rounding.descent_core import Levels, descend, gradient, refit_scales, row_errors, sweep
from hf_quant.qtensor import expand
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error

SPECS = [int_spec(4, 32), int_spec(3, -1), int_spec(2, 48, symmetric=True), int_spec(3, 200)]


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_a_sweep_does_what_the_formula_says(spec: Spec, drift: bool) -> None:
    W, H, D = correlated_layer(12, 300, seed=1)
    q = Nearest().solve(W, spec, AbsMaxRange(), None)
    quadratic = Quadratic(H, D if drift else None)
    swept = descend(W, q, quadratic, 1)
    scale, Q = expand(q.scale, spec, q.shape).double().expand(q.shape), q.dequantize().double()
    zero = torch.zeros_like(scale) if q.zero is None else expand(q.zero, spec, q.shape).double().expand(q.shape)
    for j in range(300):
        G = ((W - Q) @ H.double() + (W.double() @ D.double() if drift else 0))[:, j]
        steps = ((Q[:, j] + G / H[j, j]) / scale[:, j] + zero[:, j]).round()
        codes = steps.clamp(spec.grid.low, spec.grid.high)  # type: ignore[attr-defined]
        Q[:, j] = (codes - zero[:, j]) * scale[:, j]
    assert (swept.dequantize() - Q).abs().lt(1e-3).float().mean() > 0.98


@pytest.mark.parametrize("spec", SPECS)
def test_no_sweep_raises_the_error_and_the_gradient_stays_true(spec: Spec) -> None:
    W, H, D = correlated_layer(12, 300, seed=2)
    quadratic, q = Quadratic(H, D), Nearest().solve(W, spec, AbsMaxRange(), None)
    levels, codes, Q = Levels.of(q), q.codes.T.contiguous(), q.dequantize().T.contiguous()
    G = gradient(W, Q.T, quadratic).T.contiguous()
    errors = [output_error(W, Q.T, quadratic)]
    while sweep(Q, codes, G, H, levels):
        errors.append(output_error(W, Q.T, quadratic))
    assert len(errors) > 2
    assert all(b <= a * 1.000001 for a, b in itertools.pairwise(errors))
    assert torch.allclose(G, gradient(W, Q.T, quadratic).T, atol=1e-3 * G.abs().max())


def test_real_values_reach_the_minimum() -> None:
    """Without a grid the descent solves the linear system: Q (H) = W (H + D)."""
    W, H, D = correlated_layer(4, 40, seed=3)
    quadratic, Q = Quadratic(H, D), torch.zeros(40, 4)
    G = gradient(W, Q.T, quadratic).T.contiguous()
    for _ in range(3000):
        sweep(Q, Q, G, H, None)
    assert torch.allclose(Q.T, W @ (H + D) @ H.inverse(), atol=1e-2)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("drift", [False, True])
def test_scales_are_those_of_least_squares(spec: Spec, drift: bool) -> None:
    W, H, D = correlated_layer(6, 300, seed=4)
    quadratic, q = Quadratic(H, D if drift else None), Nearest().solve(W, spec, AbsMaxRange(), None)
    found = refit_scales(W, q, quadratic)
    assert (row_errors(W, found, quadratic) <= row_errors(W, q, quadratic)).all()
    L = torch.linalg.cholesky(H.double())
    target = W.double() @ ((H + D).double() if drift else H.double()) @ torch.linalg.inv(H.double())
    V = spec.grid.decode(q.codes) - (0 if q.zero is None else expand(q.zero, spec, q.shape))
    G, size = q.scale.shape[1], spec.block_size(q.shape)[1]
    for n in range(6):
        parts = torch.zeros(300, G).double()
        for g in range(G):
            parts[g * size : (g + 1) * size, g] = V[n, g * size : (g + 1) * size].double()
        best = torch.linalg.lstsq(L.T @ parts, L.T @ target[n]).solution
        assert torch.allclose(found.scale[n].double(), best, rtol=2e-2)  # bfloat16 has 8 bits


def test_a_group_of_zeros_keeps_its_scale() -> None:
    W, H, _ = correlated_layer(6, 96, seed=5)
    W[:, 32:64] = 0
    q = Nearest().solve(W, int_spec(3, 32), AbsMaxRange(), None)
    found = refit_scales(W, q, Quadratic(H))
    assert found.scale.isfinite().all()
    assert not found.dequantize()[:, 32:64].any()
