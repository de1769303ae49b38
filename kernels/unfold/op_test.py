"""`hf_quant::unfold` against views of the image, its gradient, and what torch asks of an operator."""

import pytest
import torch
from torch import Tensor

from hf_quant.kernels.unfold import op

CASES = [  # sizes of an image, kernel, stride, dilation
    ((9,), (3,), (1,), (1,)),
    ((8, 7), (3, 3), (1, 1), (1, 1)),
    ((8, 9), (3, 2), (2, 1), (1, 2)),
    ((8, 8), (1, 1), (2, 2), (1, 1)),
    ((5, 6, 4), (2, 3, 3), (1, 2, 1), (2, 1, 1)),
]


def image(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("sizes", "kernel", "stride", "dilation"), CASES)
def test_rows_are_those_of_the_views(sizes, kernel, stride, dilation, dtype) -> None:
    x = image(sizes, dtype)
    wanted = op.strided(x, kernel, stride, dilation)
    assert wanted.shape[1:-1] == op.positions(sizes, kernel, stride, dilation)
    assert torch.equal(op.unfold(x, kernel, stride, dilation), wanted)
    for other in (x.transpose(1, -1).contiguous().transpose(1, -1), x[:, :3], x[:0]):
        assert torch.equal(op.unfold(other, kernel, stride, dilation), op.strided(other, kernel, stride, dilation))


@pytest.mark.parametrize(("sizes", "kernel", "stride", "dilation"), CASES)
def test_gradient_and_fake(sizes, kernel, stride, dilation) -> None:
    x = image(sizes).requires_grad_()
    rows = op.strided(x, kernel, stride, dilation)
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad(rows, x, grad)
    (found,) = torch.autograd.grad(op.unfold(x, kernel, stride, dilation), x, grad)
    torch.testing.assert_close(found, wanted)
    torch.library.opcheck(torch.ops.hf_quant.unfold.default, (x, kernel, stride, dilation))


def test_a_two_dimensional_one_is_torchs_own() -> None:
    x = image((8, 9))
    rows = op.unfold(x, (3, 2), (2, 1), (1, 2))
    assert torch.equal(rows.flatten(1, 2), torch.nn.functional.unfold(x, (3, 2), (1, 2), 0, (2, 1)).transpose(1, 2))
