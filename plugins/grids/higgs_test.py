"""HIGGS: the error of its grids on a Gaussian, the rotation, and the order of the paper on a trained model."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.grids import GaussianGrid
from hf_quant.hadamard import Hadamard
from hf_quant.ledger import true_bits
from hf_quant.plugins.grids.higgs import RootMeanSquare, higgs
from hf_quant.plugins.grids.nf4 import normal_float


def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.log_softmax(-1)


GRIDS = [(1 << (b * p), p) for p, most in ((1, 8), (2, 4), (4, 2)) for b in range(1, most + 1)]


def mse(size: int, vector: int, samples: int = 1 << 18) -> float:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1)).flatten()
    grid = GaussianGrid(size, vector)
    return float((grid.decode(grid.encode(x)) - x).square().mean())


def test_errors_on_a_gaussian(claims) -> None:  # type: ignore[no-untyped-def]
    """Scalar: the optimum of Lloyd and Max, .00955. Two dimensions are better, as they must be."""
    one, two = mse(16, 1), mse(256, 2)
    holds = abs(one - 0.0095) < 2e-4 and two < one and abs(two - 0.008) < 5e-4
    claims.invariant("higgs", "mean squared error of 4 bits on a Gaussian", holds, {"p=1": one, "p=2": two})
    by_dimension = [mse(1 << (2 * p), p) for p in (1, 2, 4)]
    falls = by_dimension == sorted(by_dimension, reverse=True)
    figures = dict(zip(("p=1", "p=2", "p=4"), by_dimension, strict=True))
    claims.invariant("higgs", "at 2 bits the error falls with the dimension", falls, figures)
    assert by_dimension[0] == pytest.approx(0.1175, abs=5e-4)
    assert all(mse(n, p, 1 << 14) > 2 ** (-2 * math.log2(n) / p) for n, p in GRIDS)  # the rate-distortion bound


@pytest.mark.parametrize(("size", "vector"), GRIDS)
def test_points_are_the_means_of_what_is_nearest_to_them(size: int, vector: int) -> None:
    """Lloyd's condition, on samples the grid was not fitted to; and nearest by brute force."""
    grid = GaussianGrid(size, vector)
    table = grid.table()
    assert table.shape == (size, vector)
    assert len(table.unique(dim=0)) == size
    codes = torch.arange(size, dtype=torch.uint8)[None]
    assert grid.encode(grid.decode(codes)).equal(codes)
    x = torch.randn(1 << 18, vector, generator=torch.Generator().manual_seed(2))
    code = grid.encode(x)[:, 0].long()
    assert (x[:500, None] - table).square().sum(-1).argmin(1).eq(code[:500]).float().mean() > 0.995
    count = torch.bincount(code, minlength=size)
    mean = torch.zeros(size, vector).index_add_(0, code, x) / count[:, None].clamp_min(1)
    often = count > 500
    assert often.sum() > size // 3
    spread = (x - table[code]).square().sum(1).mean().sqrt() / count.float().sqrt()
    assert ((mean - table)[often].norm(dim=1) < 6 * spread[often] + 2e-3).all()


def test_the_rotation_is_orthogonal_and_makes_weights_gaussian(judge, claims) -> None:  # type: ignore[no-untyped-def]
    R = Hadamard(1024, 0).apply(torch.eye(704))
    away = float((R @ R.T - torch.eye(704)).abs().max())
    claims.invariant("higgs", "the rotation is orthogonal", away < 1e-5, {"away": away})
    spikes = torch.zeros(4, 256)
    spikes[:, 3], spikes[:, 77] = 1.0, -0.5
    v = Hadamard(256, 0).apply(spikes)
    kurtosis = float(v.pow(4).mean() / v.square().mean().square())
    assert kurtosis < 3 < float(spikes.pow(4).mean() / spikes.square().mean().square())


def test_scales_are_root_mean_squares_of_what_is_there() -> None:
    spec = higgs(group_size=64).weights
    W = torch.full((2, 100), 3.0)
    assert RootMeanSquare().fit(W, spec)[0].equal(torch.full((2, 2), 3.0))  # the second block is ragged
    W[0] = 0
    q = higgs().solver.solve(W, spec, RootMeanSquare(), None)
    assert q.dequantize()[0].abs().max() < 1e-3


def test_what_there_is_no_grid_for() -> None:
    for given in ({"vector": 3}, {"bits": 5}, {"bits": 3, "vector": 4}, {"group_size": 96}, {"group_size": -1}):
        with pytest.raises(ConfigError):
            higgs(**given)
    with pytest.raises(ConfigError, match="no grid"):
        GaussianGrid(10, 2)


def test_it_quantizes_while_loading(judge) -> None:  # type: ignore[no-untyped-def]
    """The same codes as quantizing the loaded model; no float model is ever whole."""
    config = QuantConfig("higgs", bits=2, vector=4)
    loaded = AutoModelForCausalLM.from_pretrained(judge.path, quantization_config=config, dtype=torch.float32)
    model = judge.model()
    hf_quant.quantize(model, config, progress=False)
    state = loaded.state_dict()
    assert all(t.equal(state[name]) for name, t in model.state_dict().items())
    assert 2 < true_bits(loaded) < 2.1


@pytest.mark.parametrize("bits", [4, 3])
def test_claim(judge, claims, bits: int) -> None:  # type: ignore[no-untyped-def]
    """Against normal-float levels in groups of 256: the same bits at K = 256, more at K = 704. Data-free: one seed."""
    ours = [judge.kl("higgs", bits=bits)]
    theirs = [judge.kl("nf4", bits=bits, group_size=256)]
    claims.order("higgs", f"{bits} bits: KL below normal-float levels in groups of 256", ours=ours, theirs=theirs)


def test_two_dimensions_beat_one(judge, claims) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = [judge.kl("higgs", bits=3)], [judge.kl("higgs", bits=3, vector=1)]
    claims.order("higgs", "3 bits: KL of 2 dimensions below that of 1", ours=ours, theirs=theirs)
    assert len(normal_float(3)) == 8


@pytest.mark.slow
@torch.no_grad()
def test_linearity_theorem(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """`KL = sum alpha_l t_l^2` with alpha from one layer at a time predicts what errors in all layers do together."""
    model, ids = judge.model(), judge.test[:6]
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    expected, g = log_probabilities(model, ids), torch.Generator().manual_seed(0)

    def measured(relative: dict[int, float]) -> float:
        """KL with Gaussian noise of squared relative size t^2 in some layers."""
        before = {i: layers[i].clone() for i in relative}
        for i, t2 in relative.items():
            noise = torch.randn(layers[i].shape, generator=g)
            layers[i] += noise * (t2**0.5 * layers[i].norm() / noise.norm())
        log_q = log_probabilities(model, ids)
        for i, weight in before.items():
            layers[i].copy_(weight)
        return float((expected.exp() * (expected - log_q)).sum(-1).mean())

    alpha = [measured({i: 0.02}) / 0.02 for i in range(len(layers))]
    predicted, found = [], []
    for _ in range(12):
        sizes = 0.05 * torch.rand(len(layers), generator=g).square() * torch.rand(1, generator=g)
        relative = dict(enumerate(sizes.tolist()))
        predicted.append(sum(alpha[i] * t2 for i, t2 in relative.items()))
        found.append(measured(relative))
    x, y = torch.tensor(predicted, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)
    r2 = float(1 - (y - x).square().sum() / (y - y.mean()).square().sum())
    figures = {"R^2": r2, "predicted": predicted, "measured": found}
    claims.invariant(
        "higgs", "linearity: the sum of alpha t^2 predicts KL for t^2 < 0.05 with R^2 > 0.9", r2 > 0.9, figures
    )
