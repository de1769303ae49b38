"""The sparse branch: against dense products, saved and loaded, counted to the bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.checkpoint import validate
from hf_quant.errors import CheckpointError
from hf_quant.formats import format_named
from hf_quant.ledger import site_bits
from hf_quant.qtensor import QTensor
from hf_quant.runtime.branches import LowRank, Sparse, column_type, merged, sparse_linear
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import int_spec


def entries(N: int, K: int, seed: int = 0) -> tuple[Tensor, Sparse]:
    """A dense matrix with a tenth of its entries, one row empty, one full."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, K, generator=g) < 0.1
    mask[0], mask[-1] = False, True
    S = torch.randn(N, K, generator=g) * mask
    return S, Sparse.of(S, mask)


def layer(N: int = 24, K: int = 40, low: bool = False) -> tuple[QuantLinear, QTensor, Tensor]:
    S, sparse = entries(N, K)
    q = refit(torch.randn(N, K, generator=torch.Generator().manual_seed(1)), int_spec(4, 8, scale="float32"))
    term = LowRank(torch.randn(3, K), torch.randn(N, 3))
    made = QuantLinear.from_qtensor(q, format_named("int-group/1"), branches=(sparse, term) if low else (sparse,))
    return made, q, S + (term.matrix() if low else 0)


@pytest.mark.parametrize(("N", "K", "T"), [(1, 1, 3), (24, 40, 0), (24, 40, 7), (63, 100, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_the_dense_ones(N: int, K: int, T: int, dtype: torch.dtype) -> None:
    S, sparse = entries(N, K)
    assert sparse.matrix().equal(S)
    assert sparse.matrix(slice(1, 2)).equal(S[1:2])
    x = torch.randn(T, K, dtype=dtype).requires_grad_()
    y = sparse_linear(x, *sparse.tensors)
    torch.testing.assert_close(
        y, (x.double() @ S.double().T).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4
    )
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    (expected,) = torch.autograd.grad((x.float() @ S.T).square().sum(), x)
    torch.testing.assert_close(
        gradient,
        expected,
        rtol=5e-2 if dtype == torch.bfloat16 else 1e-3,
        atol=0.1 if dtype == torch.bfloat16 else 1e-3,
    )


def test_torchs_checks_of_the_operator() -> None:
    _, sparse = entries(24, 40)
    torch.library.opcheck(sparse_linear, (torch.randn(5, 40, requires_grad=True), *sparse.tensors))


@pytest.mark.parametrize("low", [False, True])
def test_a_layer_adds_it(low: bool) -> None:
    made, q, S = layer(low=low)
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(made(x), x @ (q.dequantize() + S).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.dequantize(), q.dequantize() + S)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    W = torch.randn(24, 40)
    made.requantize_(W)
    assert (made.dequantize() - W).abs().max() < 1


def test_it_is_counted_to_the_bit_and_described() -> None:
    made, q, S = layer()
    entries_ = int((S != 0).sum())
    codes = sum(8 * t.numel() * t.element_size() for t in format_named("int-group/1").pack(q).values())
    assert site_bits(made) == codes + 32 * 25 + entries_ * (16 + 32)
    described = made.describe()
    assert described["sparse"] == entries_
    empty = QuantLinear.from_json(described, (24, 40), kind="linear", bias=False, dtype=torch.float32)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in made.named_parameters()
    }
    assert column_type(1 << 15) == torch.int16
    assert column_type((1 << 15) + 1) == torch.int32


def test_several_are_summed() -> None:
    (A, a), (B, b) = entries(6, 9, 0), entries(6, 9, 1)
    low, one = merged((a, LowRank(torch.ones(1, 9), torch.ones(6, 1)), b))
    assert one is not None
    assert low is not None
    assert one.matrix().equal(A + B)


def test_indices_that_leave_the_matrix_are_found() -> None:
    for name, at, value in (("sparse_columns", 3, 40), ("sparse_columns", 3, -1), ("sparse_starts", 4, 10**6)):
        made, _, _ = layer()
        getattr(made, name).data[at] = value
        with pytest.raises(CheckpointError, match=name):
            validate(nn.ModuleDict({"a": made}))


@torch.no_grad()
def test_saved_and_loaded_back_it_computes_the_same(tiny_lm_path: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.bfloat16)
    config = QuantConfig("squeezellm", bits=3, sensitive=False, sparse=0.01)
    report = hf_quant.quantize(model, config, progress=False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert all(m.sparse_columns is not None and len(m.sparse_columns) > 300 for m in layers.values())
    assert {e.name: e.bits for e in report.quantized} == {f"{n}.weight": site_bits(m) for n, m in layers.items()}
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(ids).logits.equal(logits)
