"""LLM.int8 by the kernels of this repository, run by Triton's interpreter, against the format's reference."""

import pytest
import torch

from hf_quant.every_format_test import CPU, DTYPES, held, run_kernel
from hf_quant.formats import Layer, format_named
from hf_quant.kernels.bnb_int8.format import INPUTS, WEIGHTS
from hf_quant.kernels.bnb_int8.gpu import Triton
from hf_quant.runtime.packed import refit

FORMAT = format_named("bnb-int8/1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 40])
def test_products(tokens: int, dtype: torch.dtype) -> None:
    for layer in held(FORMAT.id)[:4]:
        run_kernel((layer, dtype), tokens, FORMAT.id, "triton", CPU)


@pytest.mark.parametrize("large", [0, 1, 20])
def test_columns_of_large_inputs_are_exact(large: int) -> None:
    """Steps are exact below the threshold; large inputs, and small ones in their columns, stay as they are."""
    layer, generator = Layer((24, 160), WEIGHTS, INPUTS), torch.Generator().manual_seed(large)
    tensors = FORMAT.pack(refit(torch.randn(24, 160, generator=generator), WEIGHTS))
    x_TK = torch.randint(-127, 128, (5, 160), generator=generator) / 32.0  # a token's largest is 127 / 32: exact steps
    x_TK[:, 0] = 127 / 32
    x_TK[3, 1 : 1 + large] = 50.375
    x_TK[1, 1 : 1 + large] = 0.001  # no step of any token: in a large column it stays as it is
    y_TN = Triton().run(x_TK, tensors, Triton().prepare(tensors, layer, x_TK.dtype), layer)
    W_NK = FORMAT.weight(tensors, layer, torch.float64)
    added = x_TK.double().abs() @ W_NK.abs().T  # what float32 rounds while it adds
    assert ((y_TN.double() - x_TK.double() @ W_NK.T).abs() <= 2**-22 * added).all()


def test_tokens_of_zeros() -> None:
    layer = Layer((24, 160), WEIGHTS, INPUTS)
    tensors = FORMAT.pack(refit(torch.randn(24, 160), WEIGHTS))
    blob = Triton().prepare(tensors, layer, torch.float32)
    assert torch.equal(Triton().run(torch.zeros(2, 160), tensors, blob, layer), torch.zeros(2, 24))
