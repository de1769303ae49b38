"""Adapters on every method and every format; several at a time; the Trainer; and bases that an adapter does not fit."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.every_format_test import held, make
from hf_quant.formats import format_for, formats
from hf_quant.ledger import true_bits
from hf_quant.method import list_methods
from hf_quant.recipe import Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.testing.conformance import brief
from integration_tests.peft_merging_test import tuned
from integration_tests.peft_tuners_test import IDS, LINEARS, float_llama, llama, loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PEFT

METHODS = [m for m in list_methods() if m.domains & {"llm", "moe"}]


def arguments_of(method) -> dict[str, int | None]:
    """Its own width, little training, and groups and ranks for layers this narrow, where it has any."""
    return {"bits": None, "group_size": 32 if "group_size" in method.signature.parameters else None} | brief(method)


@pytest.mark.parametrize("method", METHODS, ids=[m.id for m in METHODS])
def test_an_adapter_on_every_method(method, tmp_path: Path) -> None:
    """Trains, saves, loads back the same, and merges into what the ledger counts as before."""
    model = llama(method.id, **arguments_of(method))
    plain, bits = copy.deepcopy(model), true_bits(model)
    adapted = tuned(model)
    loss(adapted).backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_A" in n]
    assert all(g is not None and bool(g.any()) for g in grads)
    with torch.no_grad():
        want = adapted(IDS).logits
        adapted.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(plain, tmp_path).eval()(IDS).logits, want)
        hf_quant.merge_adapter(adapted)
        assert true_bits(adapted.unload()) == bits


@pytest.mark.parametrize("format_id", sorted(formats()))
def test_an_adapter_on_every_format(format_id: str) -> None:
    """Gradients through it are those through the dense weight; a merge goes in and comes out to the bit."""
    for layer in held(format_id)[:: max(1, len(held(format_id)) // 6)]:
        if min(layer.shape) < 4:
            continue
        fmt = formats()[format_id]
        q, x_TK = make(layer, 0)
        module = nn.Sequential(QuantLinear.from_qtensor(q, fmt, inputs=layer.inputs if _dynamic(layer) else None))
        if layer.inputs is not None:
            continue
        adapted = get_peft_model(module, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        dense = nn.Sequential(nn.Linear(layer.shape[1], layer.shape[0], bias=False))
        dense[0].weight.data = module[0].base_layer.dequantize(torch.float32)
        twin = get_peft_model(dense, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        twin.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora" in k}, strict=False)
        for one in (adapted, twin):
            one(x_TK).square().sum().backward()
        ours, theirs = ([p.grad for p in m.parameters() if p.requires_grad] for m in (adapted, twin))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
        before = {k: v.clone() for k, v in adapted.state_dict().items()}
        merged = hf_quant.merge_adapter(adapted)
        assert merged[0].lost <= 1
        hf_quant.unmerge_adapter(adapted)
        assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def _dynamic(layer) -> bool:
    return layer.inputs is not None and layer.inputs.range == "dynamic"


@torch.no_grad()
def test_several_adapters_swap_and_turn_off(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    untouched = base(IDS).logits
    adapted = tuned(base)
    one = adapted(IDS).logits
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False))
    adapted.set_adapter("other")
    two = adapted(IDS).logits
    assert not torch.equal(one, two)
    adapted.save_pretrained(tmp_path / "adapters")
    assert sorted(p.parent.name for p in (tmp_path / "adapters").glob("**/hf_quant.json")) == ["adapters", "other"]

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", dtype=torch.float32)  # finds its base
    assert torch.equal(loaded(IDS).logits, one)
    loaded.load_adapter(tmp_path / "adapters" / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(IDS).logits, two)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, untouched)
    mixed = loaded(IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([one[0], two[1]]))
    loaded.set_adapter("default")
    merged = hf_quant.merge_adapter(loaded, ["other"])
    assert merged[0].how
    hf_quant.unmerge_adapter(loaded)
    assert torch.equal(loaded(IDS).logits, one)

    again = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), std=0.3)
    hotswap_adapter(again, str(tmp_path / "adapters"), adapter_name="default", torch_device="cpu")
    assert torch.equal(again(IDS).logits, one)


def test_the_trainer_takes_it_with_checkpointing_and_resumes(tmp_path: Path) -> None:
    """transformers' own Trainer, one line before it; a resumed run ends where an unbroken one does."""
    rows = [{"input_ids": i, "labels": i} for i in IDS.repeat(4, 1)]

    def trained(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            hf_quant.prepare_for_training(llama()), LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM")
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            save_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}

    whole = trained("whole", 6)
    trained("parts", 3)
    resumed = trained("parts", 6, resume=True)
    assert all(torch.allclose(whole[n], resumed[n], atol=1e-6) for n in whole)
    assert (tmp_path / "whole" / "checkpoint-6" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(llama(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]), train_dataset=rows)


def test_an_adapter_is_refused_on_a_base_it_was_not_made_for(tmp_path: Path, caplog) -> None:
    tuned(llama()).save_pretrained(tmp_path / "four")
    said = json.loads((tmp_path / "four" / "hf_quant.json").read_text())
    assert said["bits"] == ["4 bits (int-group/1)"]
    with pytest.raises(UnsupportedModel, match=r"base of 4 bits \(int-group/1\).*has 3 bits"):
        PeftModel.from_pretrained(llama(bits=3), tmp_path / "four")
    with pytest.raises(UnsupportedModel, match="and this one has 3 bits"):
        llama(bits=3).load_adapter(str(tmp_path / "four"))
    with pytest.raises(UnsupportedModel, match="and this one has 3 bits"):
        hotswap_adapter(tuned(llama(bits=3)), str(tmp_path / "four"), adapter_name="default")
    wide = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    hf_quant.quantize(wide, QuantConfig("rtn", bits=4, group_size=32), progress=False)
    with pytest.raises(UnsupportedModel, match="trained on another base"):
        PeftModel.from_pretrained(copy.deepcopy(wide), tmp_path / "four")
    (tmp_path / "four" / "hf_quant.json").unlink()  # as for an adapter made on a float model
    with pytest.raises(UnsupportedModel, match="do not fit this one"):
        PeftModel.from_pretrained(wide, tmp_path / "four")
    PeftModel.from_pretrained(llama(bits=3), tmp_path / "four")


def test_recipes_are_known_by_the_config() -> None:
    """What merging asks for: the solver that made the layer."""
    from hf_quant.integrations.merging import _recipes

    model = llama("gptq", clip_steps=1)
    recipe = _recipes(tuned(model))("model.layers.0.mlp.up_proj")
    assert isinstance(recipe, Recipe)
    assert recipe == QuantConfig("gptq", bits=4, group_size=32, clip_steps=1).quantizer()
    assert format_for(model.model.layers[0].mlp.up_proj.base_layer.layer).id == "int-group/1"


@torch.no_grad()
@pytest.mark.parametrize("method", ["lorc", "lqer", "qera"])
def test_an_adapter_begins_at_what_rounding_lost(method: str) -> None:
    """Ordinary LoRA weights, nearer to full precision than none; with the whole rank, there."""
    torch.manual_seed(0)
    original = copy.deepcopy(float_llama())
    want = original(IDS).logits
    distance = []
    for rank in (0, 8, 64):
        model = llama("rtn", bits=3)
        if rank:
            narrow = {"k_proj|v_proj": min(rank, 32)}  # 32 outputs
            config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=LINEARS, rank_pattern=narrow)
            model = get_peft_model(model, config)
            left = hf_quant.initialize_adapter(model, original, QuantConfig(method), data=IDS)
            assert len(left) == 14
            assert all(v < 1 for v in left.values())
        distance.append(float((model.eval()(IDS).logits - want).norm()))
    assert distance[1] < 0.9 * distance[0]
    assert distance[2] < 1e-2 * distance[0]


def test_an_adapter_cannot_begin_so(tmp_path: Path) -> None:
    model = get_peft_model(llama("rtn"), LoraConfig(r=4, target_modules=LINEARS))
    with pytest.raises(ConfigError, match="'rtn' has no low-rank repair"):
        hf_quant.initialize_adapter(model, float_llama(), QuantConfig("rtn"))
    with pytest.raises(UnsupportedModel, match="it is another model"):
        hf_quant.initialize_adapter(model, nn.Linear(2, 2), QuantConfig("lorc"))
    with pytest.raises(
        ConfigError, match=r"initialize_adapter takes a QuantConfig, not str: write QuantConfig\('lorc'\)"
    ):
        hf_quant.initialize_adapter(model, float_llama(), "lorc")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="a model in memory, not str; load it first"):
        hf_quant.initialize_adapter(model, "an/original", QuantConfig("lorc"))  # type: ignore[arg-type]
