"""The bound against its closed forms, and against codes whose distance to it is known."""

import math

import pytest
import torch

from hf_quant.allocation.rate_distortion import gaussian_bound, rate_gap
from hf_quant.qtensor import nearest
from hf_quant.spec import int_spec
from hf_quant.testing.layers import correlated_layer


def test_white_inputs_give_two_to_the_minus_two_r() -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for bits in (1.0, 2.5, 4.0):
        assert gaussian_bound(W, torch.eye(64), bits) == pytest.approx(float(W.square().sum()) * 4**-bits, rel=1e-4)


def test_at_high_rate_it_is_the_geometric_mean() -> None:
    """No eigenvalue is under water: `D = s^2 K |H|^(1/K) 2^-2R`."""
    W, H, _ = correlated_layer(8, 48)
    geometric = math.exp(float(torch.logdet(H.double())) / 48)
    expected = float(W.square().mean(1).sum()) * 48 * geometric * 4**-8
    assert gaussian_bound(W, H, 8) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", [0.05, 0.4, 1.0, 3.0])
def test_the_water_level_spends_exactly_the_rate(bits: float) -> None:
    """Against bisection on the level, where many eigenvalues drown."""
    W, H, _ = correlated_layer(3, 64, seed=1)
    levels = torch.linalg.eigvalsh(H.double())
    low, high = 1e-12, float(levels.max())
    for _ in range(200):
        t = math.sqrt(low * high)
        rate = float((levels / t).log2().clamp_min(0).mean() / 2)
        low, high = (low, t) if rate < bits else (t, high)
    assert gaussian_bound(W, H, bits) == pytest.approx(
        float(W.square().mean(1).sum() * levels.clamp_max(t).sum()), rel=1e-3
    )


def test_a_layer_that_sees_few_directions_needs_no_bits_for_the_others() -> None:
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(32, 32)
    H[:8, :8] = torch.eye(8)
    assert gaussian_bound(W, H, 1.0) == pytest.approx(float(W.square().mean(1).sum()) * 8 * 4**-4, rel=1e-4)


def test_the_uniform_quantizer_of_gaussian_weights_is_where_the_textbook_says() -> None:
    """16 levels at their best step: 0.01154 against 1/256, 1.56 bits^2 or 0.78 bits away (Max, 1960)."""
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    spec = int_spec(4, scale="float32")
    q = nearest(W, torch.full((64, 1), 0.3352), torch.full((64, 1), 7.5), spec)
    ours, bound = rate_gap(W, q.dequantize(), torch.eye(512), 4.0)
    assert ours / bound == pytest.approx(0.01154 * 256, rel=0.03)
