"""The Triton kernel run by Triton's interpreter; triton_test.py starts these in a process of their own."""

from itertools import product

import pytest
import torch
from torch import Tensor

from hf_quant.formats import Layer, format_named
from hf_quant.grids import IntGrid
from hf_quant.kernels.int_group.reference import zero_codes
from hf_quant.kernels.int_group.triton import matmul
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest
from hf_quant.spec import Spec, int_spec


def quantized(N: int, K: int, spec: Spec) -> tuple[QTensor, dict[str, Tensor], Layer, Tensor | None]:
    W_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    blocks = as_blocks(W_NK, spec)
    q = nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), spec), spec)
    layer, tensors = Layer((N, K), spec), format_named("int-group/1").pack(q)
    return q, tensors, layer, zero_codes(tensors, layer)


def run_poisoned(x_TK: Tensor, tensors: dict[str, Tensor], zeros: Tensor | None, layer: Layer) -> Tensor:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        return matmul(x_TK, tensors, None if zeros is None else zeros.contiguous(), layer)
    finally:
        torch.use_deterministic_algorithms(False)


CASES = [
    *((bits, 32, bool(bits % 2), (33, 100)) for bits in range(1, 9)),
    *((bits, group, False, (5, 70)) for bits, group in product((3, 4), (7, 48, -1))),
    (4, 64, True, (64, 128)),
    (6, -1, True, (1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("bits", "group", "symmetric", "shape"), CASES)
def test_one_hot_is_the_weight(
    bits: int, group: int, symmetric: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """x = identity prints the decoded weights: the same bits as the reference, whichever tile runs."""
    q, tensors, layer, zeros = quantized(*shape, int_spec(bits, group, symmetric=symmetric))
    one_hot = torch.eye(shape[1], dtype=dtype)
    assert torch.equal(run_poisoned(one_hot, tensors, zeros, layer), q.dequantize(dtype).T)
    assert torch.equal(run_poisoned(one_hot[-3:], tensors, zeros, layer), q.dequantize(dtype).T[-3:])


@pytest.mark.parametrize("block", [(-1, -1), (-1, 32), (1, 1000)])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_products_and_shared_scales(block: tuple[int, int], tokens: int) -> None:
    _, tensors, layer, zeros = quantized(37, 90, Spec(grid=IntGrid(5), zero="int", block=block))
    x_TK = torch.randn(tokens, 180, generator=torch.Generator().manual_seed(0))[:, ::2]
    y_TN = run_poisoned(x_TK, tensors, zeros, layer)
    expected = format_named("int-group/1").linear(x_TK, tensors, [], layer, "reference")
    torch.testing.assert_close(y_TN, expected, rtol=1e-5, atol=1e-5)
