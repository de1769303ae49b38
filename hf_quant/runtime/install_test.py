import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, format_for
from hf_quant.ledger import count_bits, true_bits
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.explain import explain
from hf_quant.runtime.install import dequantize_model, install_embedding, install_linear
from hf_quant.runtime.packed import Packed, refit
from hf_quant.spec import act_spec, int_spec

SPEC = int_spec(4, 16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 32, padding_idx=3)
        self.a = nn.Linear(32, 24)
        self.b = Conv1D(32, 24)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.norm(self.b(self.a(self.table(ids)))))


@torch.no_grad()
def quantized(**extras) -> Model:
    model = Model().eval()
    fmt = format_for(Layer((24, 32), SPEC))
    install_linear(model, "a", refit(model.a.weight, SPEC), fmt, **extras)
    install_linear(model, "b", refit(model.b.weight.T, SPEC), fmt)
    install_embedding(model, "table", refit(model.table.weight, SPEC), fmt, shares=["head"])
    return model


IDS = torch.tensor([[1, 2, 3], [4, 5, 49]])


def test_close_to_the_float_model_and_bias_is_the_same_object():
    plain, model = Model().eval(), quantized()
    bias = plain.a.bias
    install_linear(plain, "a", refit(plain.a.weight, SPEC), format_for(Layer((24, 32), SPEC)))
    assert plain.a.bias is bias
    want = Model().eval()(IDS)
    assert (model(IDS) - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dequantized_model_is_plain_and_computes_the_same(dtype):
    model = quantized(branches=[LowRank(torch.randn(2, 32), torch.randn(24, 2))], pre_scale=torch.rand(32) + 1)
    want = model(IDS)
    plain = dequantize_model(model, dtype)
    assert [type(m) for m in (plain.table, plain.a, plain.b, plain.head)] == [
        nn.Embedding,
        nn.Linear,
        Conv1D,
        nn.Linear,
    ]
    assert plain.head.weight is plain.table.weight
    assert plain.b.weight.shape == (24, 32)
    assert plain.a.bias.dtype == (dtype or torch.float32)
    assert plain.table.padding_idx == 3
    torch.testing.assert_close(plain.to(torch.float32)(IDS), want)


def test_only_linear_layers_and_embeddings():
    model, fmt = Model(), format_for(Layer((24, 32), SPEC))
    q = refit(model.a.weight, SPEC)
    with pytest.raises(UnsupportedModel, match="norm is a LayerNorm"):
        install_linear(model, "norm", q, fmt)
    with pytest.raises(UnsupportedModel, match="a is a Linear"):
        install_embedding(model, "a", q, fmt)


def test_ledger_counts_what_lies_on_disk(tmp_path):
    from safetensors.torch import save_file

    model = quantized(
        branches=[LowRank(torch.randn(2, 32), torch.randn(24, 2))],
        inputs=act_spec(8, static=True),
        input_range=(torch.tensor(0.1), None),
    )
    ledger = count_bits(model)
    assert ledger.weights == 2 * 24 * 32 + 50 * 32
    assert ledger.others == 24 + 32 + 2 * 32
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}  # tied: saved once
    save_file(state, tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    assert ledger.bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert 0 < size - ledger.bytes < 200 * (len(state) + 1)
    a = 24 * 32 * 4 + 24 * 2 * 16 + 3 * 2 * 32  # codes, bfloat16 scales, 4-bit zero points in whole words a column
    b = 32 * 24 * 4 + 32 * 2 * 16 + 4 * 2 * 32  # K = 24 is a group of 16 and a ragged one
    table = 50 * 32 * 4 + 50 * 2 * 16 + 7 * 2 * 32
    branch, input_scale = (2 * 32 + 24 * 2) * 32, 32
    assert ledger.weight_bits == a + branch + input_scale + b + table
    assert true_bits(model) == ledger.weight_bits / ledger.weights


def test_ledger_does_not_depend_on_the_compute_type():
    model = quantized()
    before = count_bits(model).weight_bits
    assert count_bits(model.double()).weight_bits == before
    assert true_bits(Model()) == 0.0


def test_explain_has_a_row_a_module():
    model = quantized()
    rows = explain(model)
    assert [r.name for r in rows] == [n for n, m in model.named_modules() if isinstance(m, Packed)]
    assert {r.name: r.kernel for r in rows}["table"] == "lookup"
    row = next(r for r in rows if r.name == "a")
    tried = [k.name for k in model.a.format.kernels]
    assert [*row.refused, row.kernel] == [*tried[: len(row.refused)], row.kernel]
    assert row.kernel == "reference" or row.kernel in tried
    assert all(row.refused.values())
