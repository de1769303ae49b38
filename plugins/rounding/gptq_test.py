"""GPTQ on synthetic layers: the invariants of METHODS, against a plain float64 transcription of the formula."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_quant.errors import CalibrationError, ConfigError
from hf_quant.plugins.rounding.gptaq import Drift
from hf_quant.plugins.rounding.gptq import Gptq, gptq
from hf_quant.plugins.rounding.gptq_core import BLOCK, factorize, lazy_blocks
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Job
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange, Range
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error, same

FIT = AbsMaxRange()


def loss(W: Tensor, q: QTensor, H: Tensor) -> float:
    return output_error(W, q, Quadratic(H))


SPECS = [int_spec(4, 32), int_spec(3, -1), int_spec(2, 48, symmetric=True), int_spec(3, 200), int_spec(8, 100)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("act_order", [False, True])
def test_white_inputs_give_rounding_to_nearest_exactly(spec: Spec, act_order: bool) -> None:
    W, _, _ = correlated_layer(24, 300)
    q = Gptq(act_order=act_order).solve(W, spec, FIT, Quadratic(torch.eye(300) * 7.5))
    assert same(q, Nearest().solve(W, spec, FIT, None))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("act_order", [False, True])
def test_error_is_below_rounding_to_nearest(spec: Spec, act_order: bool) -> None:
    W, H, _ = correlated_layer(24, 300, seed=1)
    q = Gptq(act_order=act_order).solve(W, spec, FIT, Quadratic(H))
    assert loss(W, q, H) < 0.9 * loss(W, Nearest().solve(W, spec, FIT, None), H)


@pytest.mark.parametrize("group", [-1, 7, 32, 150, 128])
@pytest.mark.parametrize("drift", [False, True])
def test_lazy_blocks_do_what_the_formula_says(group: int, drift: bool) -> None:
    """One column at a time in float64, without blocks, gives the same codes but for ties broken by rounding."""
    N, K, alpha = 16, 300, 0.25
    W, H, D = correlated_layer(N, K, seed=2)
    spec = int_spec(3, group)
    q = Gptq(corrections=(Drift(alpha),)).solve(W, spec, FIT, Quadratic(H, D if drift else None))

    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(K)
    U = torch.linalg.cholesky(damped.inverse(), upper=True)
    P = alpha * (D.double() @ U.T).triu(1) @ U * drift
    W, Q = W.double().clone(), torch.empty(N, K).double()
    for i in range(K):
        if i % (K if group == -1 else group) == 0:
            scale, zero = FIT.fit(W[:, i : i + (K if group == -1 else group)].float(), spec)
            assert zero is not None
        Q[:, i] = ((W[:, i] / scale[:, 0] + zero[:, 0]).round().clamp(0, 7) - zero[:, 0]) * scale[:, 0]
        w = W[:, i].clone()
        W[:, i + 1 :] -= torch.outer((w - Q[:, i]) / U[i, i], U[i, i + 1 :]) - torch.outer(w, P[i, i + 1 :])
    assert (q.dequantize() - Q).abs().lt(1e-3).float().mean() > 0.97


def test_act_order_is_undone() -> None:
    """Shuffling the inputs of a layer shuffles its solution and nothing else."""
    W, H, _ = correlated_layer(16, 96, seed=3)
    p = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    for solver in (Gptq(act_order=True), Gptq(act_order=True, damp=0.1)):
        a = solver.solve(W, int_spec(3, -1), FIT, Quadratic(H))
        b = solver.solve(W[:, p], int_spec(3, -1), FIT, Quadratic(H[p][:, p]))
        assert (a.codes[:, p] == b.codes).float().mean() > 0.99


def test_no_drift_gives_gptq_bit_for_bit() -> None:
    W, H, D = correlated_layer(16, 300, seed=4)
    for order in (False, True):
        solver = Gptq(act_order=order, corrections=(Drift(),))
        plain = Gptq(act_order=order).solve(W, int_spec(3, 64), FIT, Quadratic(H))
        assert same(plain, solver.solve(W, int_spec(3, 64), FIT, Quadratic(H, torch.zeros_like(D))))
        assert not same(plain, solver.solve(W, int_spec(3, 64), FIT, Quadratic(H, D)))


def test_drift_correction_lowers_the_asymmetric_error() -> None:
    """`||W X~ - Q X||^2` over a real sample, with the sample's own H and D."""
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(64, 64, generator=g) / 8 + torch.eye(64)
    fp = torch.randn(4000, 64, generator=g) @ mix
    x = fp + 0.2 * torch.randn(4000, 64, generator=g) @ torch.randn(64, 64, generator=g) / 8 + 0.1 * fp.roll(1, 1)
    W = torch.randn(48, 64, generator=g)
    H, D = 2 / 4000 * x.T @ x, 2 / 4000 * (fp - x).T @ x

    def error(q: QTensor) -> float:
        return float((fp @ W.T - x @ q.dequantize().T).square().sum())

    quarter, full = (Gptq(corrections=(Drift(a),)).solve(W, int_spec(4, 32), FIT, Quadratic(H, D)) for a in (0.25, 1.0))
    assert error(full) < error(quarter) < error(Gptq().solve(W, int_spec(4, 32), FIT, Quadratic(H)))


def test_dead_inputs_get_zero_weights_and_harm_nobody() -> None:
    W, H, D = correlated_layer(16, 128, seed=6)
    dead = torch.arange(0, 128, 5)
    H[dead], H[:, dead] = 0, 0
    for solver in (Gptq(corrections=(Drift(),)), Gptq(act_order=True, corrections=(Drift(),))):
        for drift in (None, D):
            q = solver.solve(W, int_spec(4, 32), FIT, Quadratic(H, drift)).dequantize()
            assert not q[:, dead].any()
            assert q.isfinite().all()
            assert (q - W).abs().mean() < 0.5


def test_a_layer_without_inputs_is_rounded_to_nearest() -> None:
    W, H, _ = correlated_layer(16, 128)
    spec = int_spec(4, 32)
    assert same(Gptq().solve(W, spec, FIT, Quadratic(H * 0)), Nearest().solve(W, spec, FIT, None))


def test_damping_grows_until_the_matrix_can_be_inverted() -> None:
    W, H, _ = correlated_layer(8, 256, seed=7, tokens=16)
    assert torch.linalg.cholesky_ex(H + 1e-9 * H.diagonal().mean() * torch.eye(256))[1] != 0
    q = Gptq(damp=1e-9).solve(W, int_spec(4, 64), FIT, Quadratic(H))
    assert loss(W, q, H) < 0.5 * loss(W, Nearest().solve(W, int_spec(4, 64), FIT, None), H)
    U = factorize(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(256)
    assert U.equal(U.triu())
    assert torch.allclose(U.T @ U @ damped, torch.eye(256), atol=1e-3)


def test_what_cannot_be_inverted_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        Gptq().solve(torch.ones(4, 8), int_spec(4, 8), FIT, Quadratic(torch.full((8, 8), float("nan"))))
    with pytest.raises(ConfigError, match="damp"):
        Gptq(damp=0)
    assert "row" in str(Gptq().refuses(Spec(grid=int_spec(4).grid, block=(-1, -1), zero="int")))


@pytest.mark.parametrize("group", [1, 7, 32, 48, 128, 129, 200, 256, 1000])
@pytest.mark.parametrize("K", [1, 31, 128, 300, 1408])
def test_blocks_cover_every_column_and_respect_groups(K: int, group: int) -> None:
    group = min(group, K)
    blocks = lazy_blocks(K, group)
    assert [c for a, b in blocks for c in range(a, b)] == list(range(K))
    starts = {a for a, _ in blocks}
    for first in range(0, K, group):
        inside = any(a <= first and min(first + group, K) <= b for a, b in blocks)
        assert inside or first in starts
    assert all(b - a <= BLOCK for a, b in blocks)


@dataclass(frozen=True, slots=True)
class Both:
    """Solves with GPTQ and writes down what rounding to nearest would have cost."""

    spent: list[tuple[float, float]]

    def refuses(self, spec: Spec) -> str | None:
        return None

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        assert quadratic is not None
        q, n = Gptq().solve(W_NK, spec, fit, quadratic), Nearest().solve(W_NK, spec, FIT, None)
        self.spent.append((loss(W_NK, q, quadratic.H_KK), loss(W_NK, n, quadratic.H_KK)))
        return q


@pytest.mark.parametrize(("bits", "group_size", "clip_steps"), [(3, 64, 1), (2, 32, 24)])
def test_no_layer_of_a_trained_model_is_worse_than_rounding(  # type: ignore[no-untyped-def]
    judge, bits: int, group_size: int, clip_steps: int
) -> None:
    spent: list[tuple[float, float]] = []
    recipe = replace(gptq(bits, group_size, clip_steps=clip_steps), solver=Both(spent))
    recipe.quantize(judge.model(), Job(data=judge.data(0)[:8], progress=False))
    assert len(spent) == 6 * 7
    assert all(ours < theirs for ours, theirs in spent)


def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Over three calibration sets that share nothing."""
    setting = {"bits": 3, "group_size": 64}
    kl = [judge.kl("gptq", seed=seed, **setting) for seed in range(3)]
    rounded = [judge.kl("rtn", **setting)] * 3
    claims.order("gptq", "KL at most 0.8 of rtn's, 3 bits in groups of 64", ours=kl, theirs=rounded, factor=0.8)


def test_searched_ranges_are_why_they_are_the_default(judge) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 3, "group_size": 64}
    assert judge.kl("gptq", **setting) < judge.kl("gptq", clip_steps=1, **setting)
