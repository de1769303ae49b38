"""Merging adapters into quantized layers, and what a user is told when an adapter and a base do not fit."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.runtime import packed as packed_module
from integration_tests.peft_tuners_test import IDS, LINEARS, float_llama, llama, loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PEFT

DATA = torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(5))


def tuned(model: nn.Module, std: float = 0.02, **options) -> PeftModel:
    """With an adapter that does something."""
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": LINEARS} | options))).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@torch.no_grad()
def test_merge_keeps_the_grid_and_unmerge_is_exact(options, tmp_path: Path) -> None:
    model = tuned(llama("gptq" if not options else "rtn", **({"clip_steps": 1} if not options else {})), **options)
    want, before = model(IDS).logits, tensors(model)
    merged = hf_quant.merge_adapter(model, data=DATA)
    assert len(merged) == 14
    assert all(0 < m.lost < 1 for m in merged), merged
    logits = model(IDS).logits
    after = tensors(model)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    with model.disable_adapter():
        model(IDS)  # PEFT unmerges here, through us
        assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    hf_quant.merge_adapter(model, data=DATA)
    assert torch.equal(model(IDS).logits, logits)
    copy.deepcopy(model).unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, logits)
    assert loaded.hf_quantizer.quantization_config.made_by["merged"]["adapters"] == ["default"]
    assert "an adapter is merged" in (tmp_path / "report.json").read_text()
    hf_quant.unmerge_adapter(model)
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert torch.equal(model(IDS).logits, want)
    assert "merged" not in model.get_base_model().hf_quantizer.quantization_config.made_by


def test_only_adapters_that_are_there_are_merged() -> None:
    model = tuned(llama())
    before = tensors(model)
    with pytest.raises(ConfigError, match="no adapter 'defualt', did you mean 'default'"):
        hf_quant.merge_adapter(model, ["defualt"])
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert all(m.how != "unchanged" for m in hf_quant.merge_adapter(model, "default"))


def test_an_adapter_saved_while_it_is_merged_is_of_the_base_it_was_trained_on(tmp_path: Path, caplog) -> None:
    model = tuned(llama())
    hf_quant.merge_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert "other codes" not in caplog.text
    PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "adapter")
    assert "other codes" in caplog.text


def test_an_adapter_that_transformers_saves_names_its_base(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=LINEARS))
    model.save_pretrained(tmp_path)
    llama().load_adapter(tmp_path)
    with pytest.raises(UnsupportedModel, match="a base of 4 bits"):
        llama(bits=8).load_adapter(tmp_path)


@torch.no_grad()
def test_under_adapters_a_base_is_dequantized() -> None:
    model = tuned(llama())
    want = model(IDS).logits
    assert hf_quant.dequantize(model) is model
    assert torch.allclose(model(IDS).logits, want, atol=1e-5)
    assert not any(isinstance(m, packed_module.Packed) for m in model.modules())


def test_a_model_with_adapters_is_not_quantized() -> None:
    """The matrices of the adapters would be, too."""
    model = tuned(float_llama())
    with pytest.raises(UnsupportedModel, match=r"q_proj holds an adapter.*merge_and_unload"):
        hf_quant.quantize(model, QuantConfig("rtn", group_size=32))
    plain = model.merge_and_unload()
    hf_quant.quantize(plain, QuantConfig("rtn", group_size=32))
    assert plain.hf_quantizer is not None


@torch.no_grad()
def test_solving_again_loses_less_than_rounding() -> None:
    """On the outputs of the layers that the statistics saw, and without statistics never more than leaving it out."""
    model = tuned(llama("gptq", bits=3, clip_steps=1))
    statistics = hf_quant.collect_statistics(model, DATA)
    solved = hf_quant.merge_adapter(model, statistics=statistics)
    want = {m.name: m.lost for m in solved}
    hf_quant.unmerge_adapter(model)
    blind = {m.name: m.lost for m in hf_quant.merge_adapter(model)}
    assert set(blind) == set(want) == set(statistics)
    assert sum(want.values()) < 0.8 * sum(blind.values())
    assert all(v <= 1 for v in blind.values())


@torch.no_grad()
def test_other_tuners_merge_by_the_same_way() -> None:
    for config in (
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=LINEARS),
    ):
        model = get_peft_model(llama(bits=8), config).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "ia3" in name or "hada" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        want = model(IDS).logits
        with model.disable_adapter():
            untouched = model(IDS).logits
        merged = hf_quant.merge_adapter(model)
        assert (model(IDS).logits - want).norm() < 0.1 * (untouched - want).norm()
        assert max(m.lost for m in merged) < 0.05


def test_a_merge_by_peft_is_told_of_the_better_way(caplog) -> None:
    packed_module._tell_of_writing.cache_clear()
    logging.getLogger("hf_quant").propagate = True
    model = tuned(llama())
    with caplog.at_level(logging.WARNING, logger="hf_quant"):
        model.merge_adapter()
    assert sum("hf_quant.merge_adapter" in r.message for r in caplog.records) == 1


def test_what_cannot_be_merged_is_said() -> None:
    with pytest.raises(UnsupportedModel, match="no adapter on a quantized layer"):
        hf_quant.merge_adapter(llama())
    prompts = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match="no adapter on a quantized layer"):
        hf_quant.merge_adapter(prompts)
    model = tuned(llama())
    with pytest.raises(UnsupportedModel, match="nothing is merged"):
        hf_quant.unmerge_adapter(model)
    hf_quant.merge_adapter(model)
    with pytest.raises(UnsupportedModel, match="unmerge_adapter"):
        hf_quant.merge_adapter(model)
    hf_quant.unmerge_adapter(model)
    broken = tuned(llama())
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n and "layers.1" in n).fill_(torch.nan)
    before = tensors(broken)
    with pytest.raises(UnsupportedModel, match="NaN"):
        hf_quant.merge_adapter(broken)
    assert all(torch.equal(t, before[n]) for n, t in tensors(broken).items())


def test_ranks_and_groups_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"r=65 is above the rank of the \[64, 64\] matrix of .*q_proj"):
        get_peft_model(llama(), LoraConfig(r=65, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="64 inputs, which qalora_group_size=48 does not divide"):
        get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_qalora=True, qalora_group_size=48))
    with pytest.raises(ConfigError, match="cannot be combined"):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2, use_qalora=True, use_dora=True))
    with pytest.raises(ConfigError, match="pooled to 2 groups"):
        get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], use_qalora=True, qalora_group_size=32))


@torch.no_grad()
def test_qalora_is_a_pooled_adapter() -> None:
    """PEFT's own forward of it is the product with our matrix."""
    model = tuned(llama(), r=2, use_qalora=True, qalora_group_size=32)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.shape == (2, 2)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    delta = layer.lora_variant["default"].get_delta_weight(layer, "default")
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ delta.T, atol=1e-5)


def test_prepare_for_training() -> None:
    model = hf_quant.prepare_for_training(llama())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing
    plain, before, after = tuned(llama()), tuned(model), hf_quant.prepare_for_training(tuned(llama()))
    assert after.is_gradient_checkpointing
    for one in (plain, before, after):
        one.train()
        loss(one).backward()
    for (name, a), b, c in zip(plain.named_parameters(), before.parameters(), after.parameters(), strict=True):
        if "lora" in name:
            assert torch.allclose(a.grad, b.grad, atol=1e-6)
            assert torch.allclose(a.grad, c.grad, atol=1e-6)
        else:
            assert not c.requires_grad
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)  # of no layer
    prompted = hf_quant.prepare_for_training(get_peft_model(llama(), prompts))
    assert [n for n, p in prompted.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    with pytest.raises(UnsupportedModel, match="no packed layer"):
        hf_quant.prepare_for_training(nn.Linear(4, 4))
