"""How samples are divided among timesteps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_quant.errors import ConfigError
from hf_quant.stages.timesteps import DensityDiversity, SkewedNormal, TimestepSampler, Uniform, divide

T20 = torch.arange(19, -1, -1) / 20


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=40), st.integers(1, 500))
def test_a_division_keeps_the_sum_and_the_proportions(weights: list[float], samples: int) -> None:
    counts = divide(torch.tensor(weights), samples)
    assert sum(counts) == samples
    exact = torch.tensor(weights).double() / torch.tensor(weights).double().sum() * samples
    assert all(abs(c - float(e)) < 1 for c, e in zip(counts, exact, strict=True))


def test_uniform() -> None:
    assert Uniform().counts(T20, None, 40) == [2] * 20
    assert Uniform().counts(T20, None, 43) == [3] * 3 + [2] * 17


def test_the_skewed_normal_has_the_probabilities_of_a_clipped_draw() -> None:
    """Against a million draws of N(.4, .4), clipped to 0 .. 1, each given to its nearest step."""
    drawn = (0.4 + 0.4 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    nearest = (drawn[:, None] - T20).abs().argmin(1)
    expected = torch.bincount(nearest, minlength=20) / 1000
    counts = torch.tensor(SkewedNormal().counts(T20, None, 1000))
    assert float((counts - expected).abs().max()) < 3  # a thousandth of a million has a deviation of 1 of 30
    assert counts[10:].sum() > counts[:10].sum()  # the half near the image has more
    assert SkewedNormal().counts(T20.flip(0), None, 1000) == counts.flip(0).tolist()
    with pytest.raises(ConfigError, match="above 0"):
        SkewedNormal(std=0)


def test_density_and_diversity_by_hand() -> None:
    """Steps 0, 1, 2 are alike, step 3 stands alone: the first have density 1, the last diversity 1."""
    features = torch.tensor([[2.0, 0], [2.1, 0], [2.05, 0], [0, 2]])
    assert DensityDiversity().counts(T20[:4], features, 8) == [2, 2, 2, 2]
    assert DensityDiversity(diversity=0).counts(T20[:4], features, 9) == [3, 3, 3, 0]
    assert DensityDiversity(diversity=3).counts(T20[:4], features, 12) == [2, 2, 2, 6]
    assert DensityDiversity().counts(T20[:3], features[:1].expand(3, 2), 6) == [2, 2, 2]


@pytest.mark.parametrize("sampler", [Uniform(), SkewedNormal(), DensityDiversity()])
def test_values(sampler: TimestepSampler) -> None:
    assert eval(repr(sampler)) == sampler
    assert hash(sampler) == hash(eval(repr(sampler)))
