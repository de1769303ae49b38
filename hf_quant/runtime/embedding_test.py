import copy

import pytest
import torch
from torch import nn

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, format_for
from hf_quant.runtime.embedding import QuantEmbedding, retie, tied_head
from hf_quant.runtime.packed import refit
from hf_quant.spec import int_spec

N, K = 77, 40


def make(spec) -> QuantEmbedding:
    table = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return QuantEmbedding.from_qtensor(refit(table, spec), format_for(Layer((N, K), spec)))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_rows_of_the_table(bits, group, symmetric):
    table = make(int_spec(bits, group, symmetric=symmetric))
    ids = torch.tensor([[0, 1, 76], [33, 33, 75]])
    assert torch.equal(table(ids), table.dequantize()[ids])
    assert table(ids[:0]).shape == (0, 3, K)


def test_one_scale_for_the_whole_table():
    spec = int_spec(8)
    spec = type(spec)(grid=spec.grid, block=(-1, -1), zero="int")
    table = make(spec)
    assert torch.equal(table(torch.arange(N)), table.dequantize())


def test_lookup_unpacks_only_the_rows(monkeypatch):
    table = make(int_spec(4, 16))
    monkeypatch.setattr(type(table.format), "unpack", lambda *_: pytest.fail("unpacked the whole table"))
    assert table(torch.tensor([5, 6])).shape == (2, K)


def test_compiles_whole():
    table, ids = make(int_spec(3, 16)), torch.tensor([1, 2])
    assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(ids), table(ids))


def test_tied_head_shares_every_tensor():
    table = make(int_spec(4, 16))
    head = tied_head(table)
    assert all(a is b for a, b in zip(table.packed_parameters(), head.packed_parameters(), strict=True))
    x = torch.randn(2, K)
    torch.testing.assert_close(head(x), x @ table.dequantize().T)


class Tied(nn.Module):
    def __init__(self, table, head):
        super().__init__()
        self.table, self.head = table, head
        self.all_tied_weights_keys = {"head.weight": "table.weight"}


def test_retie_shares_packed_tensors_again():
    table = make(int_spec(4, 16))
    model = Tied(table, copy.deepcopy(tied_head(table)))
    retie(model)
    assert model.head.qweight is table.qweight
    assert model.head.scale is table.scale
    assert model.all_tied_weights_keys["head.zero_point"] == "table.zero_point"
    assert "head.weight" not in model.all_tied_weights_keys


def test_half_a_tie_is_refused():
    with pytest.raises(UnsupportedModel, match="only one of them is quantized"):
        retie(Tied(make(int_spec(4, 16)), nn.Linear(K, N, bias=False)))
