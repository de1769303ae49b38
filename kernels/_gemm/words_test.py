"""Shuffled words are codes in another order: whoever reads them back has the canonical bytes."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_quant.every_format_test import DTYPES, held, make, tensors_of
from hf_quant.formats import Grouping, Layer, format_named, formats
from hf_quant.kernels._gemm.kernel import TritonKernel
from hf_quant.kernels._gemm.words import PLANES, Shuffle

KERNELS = [(i, k.name) for i, fmt in sorted(formats().items()) for k in fmt.kernels if isinstance(k, TritonKernel)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PLANES)), st.sampled_from((2, 4, 8)), st.integers(1, 70), st.integers(1, 400))
def test_unpack_is_the_inverse_of_pack(bits: int, unit: int, N: int, K: int) -> None:
    assume(unit <= 2 * Shuffle(bits).planes)  # a thread has no more of 8 bits
    codes = torch.randint(0, 1 << bits, (N, K), generator=torch.Generator().manual_seed(N * K), dtype=torch.uint8)
    shuffle = Shuffle(bits, unit)
    words = shuffle.pack(codes)
    assert words.shape == (*shuffle.blocks((N, K)), shuffle.words, 128)
    assert torch.equal(shuffle.unpack(words, (N, K)), codes)


def test_rows_are_unpacked_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.kernels._gemm.words.SLICE", 32 * 100)
    codes = torch.randint(0, 8, (75, 100), dtype=torch.uint8)
    assert torch.equal(Shuffle(3).unpack(Shuffle(3).pack(codes), (75, 100)), codes)


@pytest.mark.parametrize(("format_id", "name"), KERNELS)
def test_codes_are_held_once(format_id: str, name: str) -> None:
    """What a kernel has of the codes gives the canonical ones back, bit for bit."""
    fmt = format_named(format_id)
    kernel = next(k for k in fmt.kernels if k.name == name)
    assert isinstance(kernel, TritonKernel)
    assert isinstance(kernel, Grouping)
    taken = [layer for layer in held(format_id) if kernel.takes(layer) is None]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.sampled_from(taken), st.sampled_from(DTYPES), st.integers(0, 9))
    def run(layer: Layer, dtype: torch.dtype, seed: int) -> None:
        tensors = tensors_of(fmt, layer, *make(layer, seed))
        blob = kernel.prepare(tensors, layer, dtype)
        assert kernel.replaces == ("qweight",)
        found = kernel.restore(blob, layer)["qweight"]
        assert (found.dtype, found.shape) == (tensors["qweight"].dtype, tensors["qweight"].shape)
        assert torch.equal(found.view(torch.uint8), tensors["qweight"].view(torch.uint8))

    run()
