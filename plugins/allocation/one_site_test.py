"""Prefixes answered from memory give the same losses; padding counts for nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_quant.errors import UnsupportedModel
from hf_quant.plugins.allocation import one_site
from hf_quant.plugins.allocation.one_site import OneSiteKl, OneSiteMse, cut, some
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.allocator import Slot

SITES = ("model.layers.2.mlp.up_proj", "model.layers.2.mlp.gate_proj")
SLOTS = [Slot(SITES, (int_spec(2), int_spec(4))), Slot(("model.layers.2.mlp.down_proj",), (int_spec(3),))]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def half(model: LlamaForCausalLM):  # type: ignore[no-untyped-def]
    return lambda name, spec: model.get_submodule(name).weight.detach() * (1 - 1 / spec.grid.bits)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "timestep": torch.tensor(1)} for part in ids.split(3)]


@pytest.mark.parametrize("sensitivity", [OneSiteKl(), OneSiteMse()], ids=["kl", "mse"])
def test_what_is_remembered_is_what_would_be_computed(sensitivity, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model = llama()
    plain = [{"input_ids": b["input_ids"]} for b in batches()]
    runs = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    found = sensitivity.losses(model, SLOTS, half(model), plain, 0)
    assert len(runs) == 2, "once a micro-batch"
    handle.remove()
    monkeypatch.setattr(one_site, "find_blocks", lambda _: [])
    assert sensitivity.losses(model, SLOTS, half(model), plain, 0) == found
    assert found[0][0] > found[0][1] > 0


def test_padding_counts_for_nothing() -> None:
    model, (batch, _) = llama(), batches()
    ids = batch["input_ids"]
    padded = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.ones(3, 24, dtype=torch.long)}
    padded["attention_mask"][:, 12:] = 0
    plain = OneSiteKl().losses(model, SLOTS, half(model), [{"input_ids": ids}], 0)
    for a, b in zip(plain, OneSiteKl().losses(model, SLOTS, half(model), [padded], 0), strict=True):
        assert a == pytest.approx(b, rel=0.02)  # KLs of 1e-6 in float32


def test_samples_are_counted_and_cut() -> None:
    taken = some(batches(), 4)
    assert [b["input_ids"].shape[0] for b in taken] == [3, 1]
    assert some(batches(), 100)[1]["input_ids"].shape == (3, 12)
    assert cut(batches()[0], slice(1))["timestep"].dim() == 0


def test_a_model_without_logits_is_told_so() -> None:
    model = llama().model
    slots = [Slot(("layers.0.mlp.up_proj",), (int_spec(2),))]

    def rounded(name: str, spec: Spec) -> torch.Tensor:
        return model.get_submodule(name).weight.detach()

    with pytest.raises(UnsupportedModel, match="gives no logits"):
        OneSiteKl().losses(model, slots, rounded, [{"input_ids": batches()[0]["input_ids"]}], 0)
    assert OneSiteMse().losses(model, slots, rounded, [{"input_ids": batches()[0]["input_ids"]}], 0) == [(0.0,)]
