"""The rotation is orthogonal at every width, undoes itself, and its signs never change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.errors import ConfigError
from hf_quant.rotation import Rotation, _signs

sampled = settings(max_examples=40, deadline=None, derandomize=True)


@sampled
@given(st.integers(1, 130), st.sampled_from((1, 2, 16, 64, 1024)), st.integers(0, 99))
def test_it_is_orthogonal_and_is_undone(width: int, size: int, seed: int) -> None:
    rotation = Rotation(size, seed)
    R = rotation.apply(torch.eye(width))
    assert (R @ R.T - torch.eye(width)).abs().max() < 1e-5
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    assert (rotation.inverse(rotation.apply(x)) - x).abs().max() < 1e-5
    assert rotation.apply(x)[1:2].equal(rotation.apply(x[1:2]))
    assert Rotation.from_json(rotation.to_json()) == rotation


def test_blocks_are_hadamards_matrix() -> None:
    R = Rotation(4, 7).apply(torch.eye(12)) / _signs(12, 7)[:, None]
    H = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert R.equal(torch.block_diag(H, H, H))


def test_signs_are_splitmix64s() -> None:
    """The first outputs begun at 0, of its author's reference: e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f."""
    assert _signs(4, 0).tolist() == [-1, 1, 1, -1]
    assert abs(float(_signs(4096, 3).mean())) < 0.05
    assert not _signs(64, 1).equal(_signs(64, 2))


def test_impossible_rotations() -> None:
    for size, seed in ((0, 0), (3, 0), (2.0, 0), (4, -1), (4, None)):
        with pytest.raises(ConfigError):
            Rotation(size, seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exactly"):
        Rotation.from_json({"size": 4})
