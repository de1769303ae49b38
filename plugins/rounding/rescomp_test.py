"""ResComp: without its terms it is GPTQ; with them it does what the formula says; what it does to a trained model."""

from typing import Literal

import pytest
import torch

from hf_quant.plugins.rounding.gptaq import Drift
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.rescomp import Residual, rescomp
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.testing.layers import correlated_layer, same

FIT, SPEC = AbsMaxRange(), int_spec(3, 64)


def test_without_its_terms_it_is_gptq_and_without_the_second_gptaq(claims) -> None:  # type: ignore[no-untyped-def]
    W, H, D = correlated_layer(16, 300)
    both = Quadratic(H, D)
    none = Gptq(corrections=(Residual(0, 0),)).solve(W, SPEC, FIT, both)
    claims.invariant(
        "rescomp", "alpha = alpha2 = 0 gives the codes of gptq", same(none, Gptq().solve(W, SPEC, FIT, both))
    )
    first = Gptq(corrections=(Residual(0.25, 0, "latent"),)).solve(W, SPEC, FIT, both)
    gptaq = Gptq(corrections=(Drift(0.25),)).solve(W, SPEC, FIT, both)
    claims.invariant("rescomp", "alpha2 = 0 on latent columns gives the codes of gptaq", same(first, gptaq))
    assert not same(none, rescomp().solver.solve(W, SPEC, FIT, both))


@pytest.mark.parametrize("of", ["clamped", "value"])
@pytest.mark.parametrize("drift", [True, False])
def test_it_does_what_the_formula_says(of: Literal["clamped", "value"], drift: bool) -> None:
    """One column at a time in float64, without lazy blocks."""
    W, H, D = correlated_layer(16, 300, seed=2)
    D = D * drift
    solver = Gptq(corrections=(Residual(0.3, 0.2, of),))
    q = solver.solve(W, int_spec(3), FIT, Quadratic(H, D if drift else None))
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(300)
    U = torch.linalg.cholesky(damped.inverse(), upper=True)
    P = 0.3 * (D.double() @ U.T).triu(1) @ U
    R = 0.2 * ((H + D).double() @ U.T).triu(1) @ U
    first, Q = W.double(), torch.empty(16, 300).double()
    assert q.zero is not None
    scale, zero = q.scale[:, 0].double(), q.zero[:, 0].double()
    W = first.clone()
    for i in range(300):
        Q[:, i] = ((W[:, i] / scale + zero).round().clamp(0, 7) - zero) * scale
        w = Q[:, i] if of == "value" else W[:, i].clamp(-zero * scale, (7 - zero) * scale)
        e = (W[:, i] - Q[:, i]) / U[i, i]
        W[:, i + 1 :] -= torch.outer(e, U[i, i + 1 :])
        W[:, i + 1 :] += torch.outer(w, P[i, i + 1 :]) + torch.outer(first[:, i] - w, R[i, i + 1 :])
    assert (q.dequantize() - Q).abs().lt(1e-3).float().mean() > 0.97


def test_two_bits_take_the_rounded_columns() -> None:
    for bits, of in ((4, "clamped"), (3, "clamped"), (2, "value")):
        assert rescomp(bits).solver.corrections == (Residual(of=of),)  # type: ignore[attr-defined,arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "reproduced"), [("gptq", True), ("gptaq", False)])
def test_claim(judge, claims, peer: str, reproduced: bool) -> None:  # type: ignore[no-untyped-def]
    """The departure term does not lower the error here: all of the gain over GPTQ is that of GPTAQ's drift."""
    setting = {"bits": 3, "group_size": -1}
    ours = [judge.kl("rescomp", seed=seed, **setting) for seed in range(3)]
    theirs = [judge.kl(peer, seed=seed, **setting) for seed in range(3)]
    statement = f"KL no higher than {peer}'s, 3 bits, a row a scale"
    claims.order("rescomp", statement, ours=ours, theirs=theirs, reproduced=reproduced)
