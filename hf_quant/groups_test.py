"""Groups are found by watching, whatever the modules are called; folds are exact and checked."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_quant.config import QuantConfig
from hf_quant.errors import UnsupportedModel
from hf_quant.groups import find_groups
from hf_quant.rewriting import pairs
from hf_quant.rewriting.pairs import link
from hf_quant.rewriting.rewrite import fold
from hf_quant.sites import Site, SiteGroup, walk
from hf_quant.stages.transform import Diagonal


class OddNorm(nn.Module):
    """Gemma's kind: multiplies by one plus the weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.4, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class Odd(nn.Module):
    """Norm to two readers; what they make goes to one more that has no norm."""

    def __init__(self, residual_after_norm: bool = False) -> None:
        super().__init__()
        self.sense, self.left, self.right, self.out = OddNorm(8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.residual_after_norm = residual_after_norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.sense(hidden_states)
        y = self.out(torch.tanh(self.left(x)) * self.right(x))
        return y + (x if self.residual_after_norm else hidden_states)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_readers_of_one_tensor_are_a_group_and_its_norm_the_producer() -> None:
    torch.manual_seed(0)
    block = Odd()
    sites = [
        Site(n, "linear", (m.out_features, m.in_features)) for n, m in block.named_modules() if isinstance(m, nn.Linear)
    ]
    first, second = find_groups(block, "", sites, lambda b: b(X))
    assert [s.name for s in first.sites] == ["left", "right"]
    assert (first.producer, second.producer) == ("sense", None)


@pytest.mark.parametrize("norm", ["odd", "layer", "plain"])
def test_a_fold_keeps_the_function(norm: str) -> None:
    torch.manual_seed(0)
    block = Odd()
    if norm == "layer":
        block.sense = nn.LayerNorm(8)
        nn.init.uniform_(block.sense.bias)
    if norm == "plain":
        block.sense = nn.RMSNorm(8)
    before = block(X)
    group = SiteGroup((Site("left", "linear", (6, 8)), Site("right", "linear", (6, 8))), "sense")
    fold(block, group, Diagonal(torch.linspace(0.2, 7, 8)))
    torch.testing.assert_close(block(X), before, rtol=1e-4, atol=1e-5)


def test_llama_groups_without_a_table() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    block, name = model.model.layers[0], "model.layers.0"
    hidden = torch.randn(1, 6, 32)
    rope = model.model.rotary_emb(hidden, torch.arange(6)[None])

    def run(b: nn.Module) -> Tensor:
        out: Tensor = b(hidden, position_embeddings=rope)
        return out

    groups = link(find_groups(block, name, [s for s in walk(model) if s.block == name], run), block, name, run)
    found = [
        ({s.name.rpartition(".")[2] for s in g.sites}, (g.producer or "").removeprefix(name + ".")) for g in groups
    ]
    assert found == [
        ({"q_proj", "k_proj", "v_proj"}, "input_layernorm"),
        ({"o_proj"}, "self_attn.v_proj"),
        ({"gate_proj", "up_proj"}, "post_attention_layernorm"),
        ({"down_proj"}, "mlp.up_proj"),
    ]


class Wrong(nn.Module):
    """A model whose residual is taken after the norm, so a scale cannot be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Odd(residual_after_norm=True) for _ in range(2)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def test_a_norm_that_the_residual_reads_too_is_no_producer() -> None:
    torch.manual_seed(0)
    batches = [{"hidden_states": X * torch.tensor([1, 1, 30, 1, 1, 1, 1, 1.0])}]
    model = Wrong()
    norms = {n: p.clone() for n, p in model.named_parameters() if "sense" in n}
    config = QuantConfig("awq", bits=2, group_size=8)
    config.quantizer().quantize(model, config.job(data=batches, progress=False))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in norms.items())


def test_a_fold_that_changes_the_function_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(pairs, "_alone", lambda *_: True)
    batches = [{"hidden_states": X * torch.tensor([1, 1, 30, 1, 1, 1, 1, 1.0])}]
    config = QuantConfig("awq", bits=2, group_size=8)
    with pytest.raises(UnsupportedModel, match=r"changed what block layers\.0 computes"):
        config.quantizer().quantize(Wrong(), config.job(data=batches, progress=False))
