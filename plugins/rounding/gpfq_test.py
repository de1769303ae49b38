"""GPFQ: the path itself, on samples; one pass; orthogonal inputs; wider layers; a trained model."""

from statistics import fmean

import pytest
import torch
from torch import Tensor

from hf_quant.plugins.rounding.gpfq import PathFollowing
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error, same

FIT = AbsMaxRange()


def follow(W: Tensor, fp: Tensor, x: Tensor, scale: Tensor, spec: Spec) -> Tensor:
    """The paper's recursion on the samples themselves, one vector u for every neuron, in float64."""
    W, fp, x = W.double(), fp.double(), x.double()
    Q, u = torch.zeros_like(W), torch.zeros(len(W), len(x)).double()
    for t in range(W.shape[1]):
        u += W[:, t : t + 1] * fp[:, t]
        steps = (u @ x[:, t]) / x[:, t].square().sum() / scale[:, 0]
        Q[:, t] = spec.grid.decode(spec.grid.encode(steps.float())) * scale[:, 0]
        u -= Q[:, t : t + 1] * x[:, t]
    return Q


def test_it_follows_the_path_of_the_samples() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 150, generator=g) @ (torch.eye(150) + torch.randn(150, 150, generator=g) / 12)
    fp, W, spec = x + 0.1 * x.roll(1, 1), torch.randn(16, 150, generator=g), int_spec(4, symmetric=True)
    for drifted, D in ((fp, (fp - x).T @ x), (x, None)):
        q = PathFollowing().solve(W, spec, FIT, Quadratic(x.T @ x, D))
        expected = follow(W, drifted, x, q.scale, spec)
        assert (q.dequantize() - expected).abs().lt(1e-3).float().mean() > 0.97


def test_orthogonal_inputs_give_rounding_to_nearest(claims) -> None:  # type: ignore[no-untyped-def]
    W, spec = torch.randn(16, 100, generator=torch.Generator().manual_seed(0)), int_spec(3, 32)
    q = PathFollowing().solve(W, spec, FIT, Quadratic(torch.linspace(1, 5, 100).diag()))
    nearest = Nearest().solve(W, spec, FIT, None)
    claims.invariant("gpfq", "orthogonal inputs give rounding to nearest", same(q, nearest))


def test_no_column_to_come_is_used(claims) -> None:  # type: ignore[no-untyped-def]
    """Other weights and inputs behind column 64 leave the codes before it as they are."""
    (W, H, D), (W2, H2, D2) = (correlated_layer(16, 128, seed=s) for s in (0, 1))
    for new, old in ((W2, W), (H2, H), (D2, D)):
        new[:, :64] = old[:, :64]
        if len(old) == 128:
            new[:64] = old[:64]
    a, b = (PathFollowing().solve(w, int_spec(3, 32), FIT, Quadratic(h, d)) for w, h, d in ((W, H, D), (W2, H2, D2)))
    kept = torch.equal(a.codes[:, :64], b.codes[:, :64]) and not torch.equal(a.codes, b.codes)
    claims.invariant("gpfq", "one pass, which uses no column to come", kept)


def test_wider_layers_lose_less(claims) -> None:  # type: ignore[no-untyped-def]
    """Gaussian inputs and weights, 256 samples: the relative output error falls with every doubling of the width."""
    spec, errors = int_spec(3, symmetric=True), []
    for K in (128, 256, 512, 1024):
        of_width = []
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            x, W = torch.randn(256, K, generator=g), torch.rand(32, K, generator=g) * 2 - 1
            H = Quadratic(x.T @ x)
            of_width.append(output_error(W, PathFollowing().solve(W, spec, FIT, H), H) / output_error(W, W * 0, H))
        errors.append(fmean(of_width))
    falls = errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    claims.invariant("gpfq", "relative error falls as a layer gets wider, 128 to 1024", falls, {"errors": errors})


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 4, "group_size": 64, "symmetric": True}
    ours = [judge.kl("gpfq", seed=seed, **setting) for seed in range(3)]
    claims.order(
        "gpfq", "KL no higher than rtn's, 4 bits in groups of 64", ours=ours, theirs=[judge.kl("rtn", **setting)] * 3
    )
