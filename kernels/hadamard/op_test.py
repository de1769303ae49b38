"""The operator against the dense matrix: every width, every type, its gradient, compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.hadamard import Hadamard
from hf_quant.kernels.hadamard.op import hadamard, rotate


@settings(deadline=None, max_examples=40)
@given(
    blocks=st.integers(1, 3), size=st.sampled_from([1, 2, 12, 20, 64, 96, 128, 176, 256, 768]), seed=st.integers(0, 99)
)
def test_it_is_the_dense_matrix_and_its_inverse_undoes_it(blocks: int, size: int, seed: int) -> None:
    x = torch.randn(3, 2, blocks * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = hadamard(x, size, seed, False)
    assert (y - x @ Hadamard(size, seed).matrix(blocks * size)).abs().max() < 1e-10
    assert (hadamard(y, size, seed, True) - x).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_types_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(16, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = x.double() @ Hadamard(768, 5).matrix(1536)
    got = hadamard(x, 768, 5, False)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 1.01 * torch.finfo(dtype).eps / 2 * want.abs().max() + 1e-5


@pytest.mark.parametrize(("size", "width"), [(1024, 704), (64, 64), (176, 352), (16, 100), (4096, 4096)])
def test_it_computes_what_stored_weights_are_read_with(size: int, width: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    for rotation in (Hadamard(size), Hadamard(size, 9)):
        assert (rotate(x, rotation) - rotation.apply(x)).abs().max() < 1e-5
        assert (hadamard(x, size, rotation.seed, True) - rotation.inverse(x)).abs().max() < 1e-5


def test_gradients_of_both_orders() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda t, i=inverse: hadamard(t, 12, 3, i), x)
        assert torch.autograd.gradgradcheck(lambda t, i=inverse: hadamard(t, 12, 3, i).square(), x)


def test_the_operator_is_sound() -> None:
    torch.library.opcheck(hadamard, (torch.randn(3, 24, requires_grad=True), 12, 3, False))
    assert hadamard(torch.empty(0, 24), 12, None, False).shape == (0, 24)


def test_size_one_without_signs_is_a_copy() -> None:
    x = torch.randn(2, 3)
    y = hadamard(x, 1, None, False)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()
