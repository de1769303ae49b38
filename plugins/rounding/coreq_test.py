"""CoreQ: greedy and without drift it is GPTQ; the beam never costs more; the target is what least squares says."""

import pytest
import torch

from hf_quant.errors import ConfigError
from hf_quant.plugins.rounding.coreq import SuccessiveRounding, corrected
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error, same

FIT = AbsMaxRange()
SPECS = [int_spec(4, 32), int_spec(3), int_spec(2, 48, symmetric=True)]


def damped_row_costs(W: torch.Tensor, q: QTensor, H: torch.Tensor) -> torch.Tensor:
    """What the triangular system adds up to: `diag(E (H + l I) E^T)`."""
    E = (W - q.dequantize()).double()
    return ((E @ (H.double() + 0.01 * H.diagonal().mean() * torch.eye(len(H)))) * E).sum(1)


@pytest.mark.parametrize("spec", SPECS)
def test_greedy_and_without_drift_it_is_gptq(claims, spec: Spec) -> None:  # type: ignore[no-untyped-def]
    W, H, _ = correlated_layer(24, 300)
    q = SuccessiveRounding(beam=1).solve(W, spec, FIT, Quadratic(H))
    gptq = Gptq(act_order=True).solve(W, spec, FIT, Quadratic(H))
    agree = float((q.codes == gptq.codes).float().mean())  # sums in another order may break a tie
    statement = f"a beam of 1 and no drift give the codes of gptq, {spec.grid}"
    claims.invariant("coreq", statement, q.scale.equal(gptq.scale) and agree > 0.999, {"agree": agree})


@pytest.mark.parametrize("spec", SPECS)
def test_no_row_costs_more_than_the_greedy_choice(claims, spec: Spec) -> None:  # type: ignore[no-untyped-def]
    W, H, _ = correlated_layer(24, 300, seed=1)
    cost = [damped_row_costs(W, SuccessiveRounding(k).solve(W, spec, FIT, Quadratic(H)), H) for k in (1, 4, 8)]
    falls = all(bool((c <= cost[0] * 1.0001).all()) for c in cost[1:]) and float(cost[2].sum()) < 0.95 * float(
        cost[0].sum()
    )
    figures = {"cost": [float(c.sum()) for c in cost]}
    claims.invariant("coreq", f"no row's triangular cost above the greedy one, {spec.grid}", falls, figures)


def test_a_wide_beam_finds_the_best_of_all() -> None:
    """Six weights of two bits: 4096 solutions, tried one by one."""
    W, H, _ = correlated_layer(5, 6, seed=2, tokens=40)
    q = SuccessiveRounding(beam=4096).solve(W, int_spec(2), FIT, Quadratic(H))
    every = torch.cartesian_prod(*[torch.arange(4)] * 6).to(torch.uint8)
    for n in range(5):
        zero = None if q.zero is None else q.zero[n : n + 1].expand(4096, 1)
        all_of = QTensor(every, q.scale[n : n + 1].expand(4096, 1), zero, q.spec, (4096, 6))
        costs = damped_row_costs(W[n : n + 1].expand(4096, 6), all_of, H)
        assert damped_row_costs(W, q, H)[n] <= costs.min() * 1.25  # the beam knows the two nearest levels only


def test_the_target_absorbs_what_is_linear_in_the_inputs() -> None:
    """Drift `X~ - X = M X` exactly: c = 1 and W* X = W X~; independent drift: c near 0."""
    g = torch.Generator().manual_seed(0)
    x, M, W = (torch.randn(s, generator=g) for s in ((4000, 24), (24, 24), (8, 24)))
    d = x @ M.T / 20
    target = corrected(W, Quadratic(x.T @ x, d.T @ x, DD_KK=d.T @ d), 1e-6)
    assert torch.allclose(target @ x.T, W @ (x + d).T, atol=1e-2)
    d = torch.randn(4000, 24, generator=g) / 4
    assert (corrected(W, Quadratic(x.T @ x, d.T @ x, DD_KK=d.T @ d), 0.01) - W).norm() < 1e-3 * W.norm()


def test_edges() -> None:
    W, H, D = correlated_layer(8, 96, seed=2)
    spec = int_spec(4, 32)
    assert same(SuccessiveRounding().solve(W, spec, FIT, Quadratic(H * 0)), Nearest().solve(W, spec, FIT, None))
    for of in (H, D):
        of[::5], of[:, ::5] = 0, 0
    q = SuccessiveRounding(2).solve(W, spec, FIT, Quadratic(H, D, DD_KK=H * 0.1)).dequantize()
    assert not q[:, ::5].any()
    assert q.isfinite().all()
    with pytest.raises(ConfigError, match="beam"):
        SuccessiveRounding(0)
    assert output_error(W, q, Quadratic(H)) < 0.1 * output_error(W, W * 0, Quadratic(H))


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["gptq", "gptaq"])
def test_claim(judge, claims, peer: str) -> None:  # type: ignore[no-untyped-def]
    """With 16 calibration sequences of 256 tokens."""
    setting = {"bits": 3, "group_size": -1}
    ours = [judge.kl("coreq", seed=seed, **setting) for seed in range(3)]
    theirs = [judge.kl(peer, seed=seed, **setting, **({"alpha": 1.0} if peer == "gptaq" else {})) for seed in range(3)]
    claims.order("coreq", f"KL no higher than {peer}'s, 3 bits, a row a scale", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_a_beam_of_8_is_no_worse_than_1(judge, claims) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 3, "group_size": -1}
    ours, theirs = ([judge.kl("coreq", seed=seed, beam=b, **setting) for seed in range(3)] for b in (8, 1))
    claims.order("coreq", "a beam of 8 no worse than 1, 3 bits, a row a scale", ours=ours, theirs=theirs)
