"""Products by expert, run by Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.kernels._gemm.configs import Config
from hf_quant.kernels._gemm.launch import Routing, dequantize, matmul
from hf_quant.kernels._gemm.operand import Weight, affine_ranges, ranges_of
from hf_quant.kernels._gemm.routing import by_expert


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 9), st.sampled_from((1, 4, 16)))
def test_every_row_lies_in_a_tile_of_its_expert(T: int, copies: int, experts: int, BM: int) -> None:
    chosen = torch.randint(-1, experts + 1, (T, copies), generator=torch.Generator().manual_seed(T))
    order, tile = by_expert(chosen, experts, BM)
    assert len(order) == len(tile) * BM
    inside = (chosen >= 0) & (chosen < experts)
    rows = order[order < T * copies]
    assert sorted(rows.tolist()) == inside.flatten().nonzero()[:, 0].tolist()
    for e, rows in zip(tile.tolist(), order.view(-1, BM).tolist(), strict=True):
        assert all(chosen.flatten()[r] == e for r in rows if r < T * copies)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.sampled_from((torch.float16, torch.bfloat16)))
def test_products_by_expert(T: int, copies: int, experts: int, dtype: torch.dtype) -> None:
    """Each row is the product of its token with its expert's weight, whatever else the launch computes."""
    g = torch.Generator().manual_seed(T)
    N, K, group, BM = 40, 150, 32, 16
    weight = Weight((N, K), 4, group, ranges="pairs")
    blobs = []
    for _ in range(experts):
        codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
        scale = (torch.rand(N, -(-K // group), generator=g) + 0.5).to(dtype)
        zero = torch.randint(0, 16, scale.shape, generator=g, dtype=torch.uint8)
        blobs.append([weight.shuffle.pack(codes), *affine_ranges(scale, zero, N, dtype)])
        assert ranges_of(blobs[-1]) == "pairs"
    stacked = [torch.stack(parts) for parts in zip(*blobs, strict=True)]
    x = torch.randn(T, K, generator=g).to(dtype)
    chosen = torch.randint(0, experts, (T, copies), generator=g)
    order, tile = by_expert(chosen, experts, BM)
    routing = Routing(order, tile, copies, stacked[0][0].numel(), stacked[1][0].numel())
    y = matmul(x, stacked, weight, dtype, routing=routing, config=Config("tensor", BM=BM, BN=32))
    for row, e in enumerate(chosen.flatten().tolist()):
        expected = x[row // copies].double() @ dequantize(blobs[e], weight, dtype).double().T
        assert (y[row].double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 1e-3
