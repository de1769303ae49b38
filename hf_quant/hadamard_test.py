"""Hadamard matrices are what they are called, for every width; their signs are nailed down."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.errors import ConfigError
from hf_quant.hadamard import Hadamard, core, paley, signs, sylvester


@pytest.mark.parametrize("m", [m for m in range(4, 257, 4) if core(m) == m])
def test_paley_matrices_are_hadamard_matrices(m: int) -> None:
    K = paley(m).double()
    assert K.abs().eq(1).all()
    assert torch.equal(K @ K.T, m * torch.eye(m).double())


def test_sylvester_matrices_too() -> None:
    H = sylvester(64)
    assert torch.equal(H, H.T)
    assert torch.equal(H @ H, 64 * torch.eye(64))


def test_widths_of_known_models_are_transformed_whole_but_for_one() -> None:
    for width in (256, 768, 1408, 3072, 4096, 5632, 8960, 9728, 14336, 18944, 28672):
        assert Hadamard.of_width(width).size == width
    assert Hadamard.of_width(11008).size == 256  # 43 * 256: Paley's orders divide it only beyond what is fast


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 400), seed=st.one_of(st.none(), st.integers(0, 2**62 - 1)))
def test_every_width_has_an_orthogonal_matrix_that_survives_json(width: int, seed: int | None) -> None:
    rotation = Hadamard.of_width(width, seed)
    R = rotation.matrix(width)
    assert width % rotation.size == 0
    assert (R @ R.T - torch.eye(width)).abs().max() < 1e-12
    assert Hadamard.from_json(rotation.to_json()) == rotation


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    width=st.integers(1, 130),
    size=st.sampled_from((1, 2, 16, 64, 1024)),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_a_power_of_two_fits_every_width_and_a_rows_bits_depend_on_it_alone(
    width: int, size: int, seed: int | None
) -> None:
    rotation = Hadamard(size, seed)
    assert rotation.refuses(width) is None
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed or 0))
    assert (rotation.apply(x) - x @ rotation.matrix(width, torch.float32)).abs().max() < 1e-5
    assert (rotation.inverse(rotation.apply(x)) - x).abs().max() < 1e-5
    assert rotation.apply(x)[1:2].equal(rotation.apply(x[1:2]))


def test_blocks_are_hadamards_matrix() -> None:
    R = Hadamard(4).apply(torch.eye(12))
    H = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert R.equal(torch.block_diag(H, H, H))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paleys_factor_too_in_every_type(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    v = Hadamard(48, 3).apply(x)
    assert v.dtype == dtype
    want = x.double() @ Hadamard(48, 3).matrix(96)
    assert (v.double() - want).abs().max() < 4 * torch.finfo(dtype).eps * want.abs().max()
    assert "order 6" in str(Hadamard(12).refuses(18))


def test_signs_never_change() -> None:
    """SplitMix64 begun at 0 gives e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f, f88bb8a8724c81ec, ..."""
    assert signs(8, 0).tolist() == [-1, 1, 1, -1, 1, 1, 1, -1]
    assert signs(1000, 7).mean().abs() < 0.1


@pytest.mark.parametrize(
    "data", [{"size": 3, "seed": None}, {"size": 8}, {"size": 8, "seed": -1}, {"size": 8, "x": 1}, 8]
)
def test_what_is_no_rotation_is_refused(data: object) -> None:
    with pytest.raises(ConfigError):
        Hadamard.from_json(data)  # type: ignore[arg-type]
