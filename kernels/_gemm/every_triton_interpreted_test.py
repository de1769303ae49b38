"""Every format's GPU kernel against the definition, run by Triton's interpreter. To be registered is to be covered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quant.every_format_test import CPU, DTYPES, held, kernel_named, make, run_kernel, tensors_of
from hf_quant.formats import Layer, format_named, formats
from hf_quant.kernels._gemm.kernel import TritonKernel

IDS = [i for i in sorted(formats()) if any(isinstance(k, TritonKernel) for k in formats()[i].kernels)]


def taken(format_id: str) -> list[Layer]:
    kernel = kernel_named(format_id, "triton")
    assert isinstance(kernel, TritonKernel)
    return [layer for layer in held(format_id) if kernel.takes(layer) is None]


def test_which() -> None:
    assert {"int-group/1", "int8-act/1", "lut-group/1", "codebook-group/1", "float8/1", "bnb-nf4/1"} <= set(IDS)


@pytest.mark.parametrize("format_id", IDS)
def test_products(format_id: str) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.sampled_from(taken(format_id)), st.sampled_from(DTYPES), st.sampled_from((0, 1, 2, 9, 40)))
    def run(layer: Layer, dtype: torch.dtype, tokens: int) -> None:
        run_kernel((layer, dtype), tokens, format_id, "triton", CPU)

    run()


@pytest.mark.parametrize("format_id", [i for i in IDS if i != "int8-act/1"])
def test_one_hot_is_the_weight(format_id: str) -> None:
    """One-hot tokens print the decoded weights: the bits of the reference."""
    fmt, kernel = format_named(format_id), kernel_named(format_id, "triton")

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        st.sampled_from([x for x in taken(format_id) if x.inputs is None and x.weights.rotation is None]),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
    )
    def run(layer: Layer, dtype: torch.dtype, seed: int) -> None:
        q, x_TK = make(layer, seed)
        tensors = tensors_of(fmt, layer, q, x_TK)
        K = layer.shape[1]
        for columns in (range(K), range(min(K, 3))):  # many tokens and few
            one_hot = torch.eye(K, dtype=dtype)[list(columns)]
            y_TN = kernel.run(one_hot, tensors, kernel.prepare(tensors, layer, dtype), layer)
            assert torch.equal(y_TN, fmt.weight(tensors, layer, dtype).T[list(columns)])

    run()


@pytest.mark.parametrize("format_id", IDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_low_rank(format_id: str, tokens: int) -> None:
    """The branch joins in the epilogue: what the product and the branch give apart, with one rounding less."""
    fmt, kernel, layer = format_named(format_id), kernel_named(format_id, "triton"), taken(format_id)[-1]
    assert isinstance(kernel, TritonKernel)
    q, x_TK = make(layer, 0)
    tensors, x_TK = tensors_of(fmt, layer, q, x_TK), x_TK.repeat(3, 1)[:tokens]
    generator = torch.Generator().manual_seed(1)
    branch = tuple(torch.randn(n, 20, generator=generator) for n in (tokens, layer.shape[0]))
    blob = kernel.prepare(tensors, layer, torch.float32)
    together = kernel.product(x_TK, tensors, blob, layer, (branch[0], branch[1]))
    torch.testing.assert_close(
        together, kernel.run(x_TK, tensors, blob, layer) + branch[0] @ branch[1].T, rtol=1e-5, atol=1e-4
    )
