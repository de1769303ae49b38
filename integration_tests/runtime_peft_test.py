"""PEFT and accelerate see quantized layers as plain ones: nothing is registered anywhere."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_quant.formats import Layer, format_for
from hf_quant.runtime.install import install_linear
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.sites import kept_reason, linear_shape
from hf_quant.spec import int_spec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = int_spec(8, 16)
    for name, module in list(model.named_modules()):
        found = linear_shape(module)
        if found and not kept_reason(name):
            install_linear(model, name, refit(module.weight.detach(), spec), format_for(Layer(found[1], spec)))
    return model


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=lambda o: next(iter(o), "lora"),
)
def test_adapters_train_save_and_load(model, options, tmp_path):
    plain = copy.deepcopy(model)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    assert isinstance(tuned.base_model.model.model.layers[0].mlp.up_proj.base_layer, QuantLinear)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, before = torch.optim.AdamW(trained, lr=1e-2), loss(tuned).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss(tuned).backward()
        optimizer.step()
    assert loss(tuned).item() < before - 0.2
    if options.get("init_lora_weights"):
        return  # these move part of the base weight into the adapter, so the base is not the one saved
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, tuned.eval()(IDS).logits)


def test_merge_is_near_and_lossless_after_dequantizing(model):
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    want, untouched = tuned(IDS).logits, model(IDS).logits
    merged = tuned.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.up_proj, QuantLinear)
    error = (merged(IDS).logits - want).norm()
    assert error < 0.2 * (want - untouched).norm()  # requantized to 8 bits: most of the adapter survives


def test_upcast_for_training(model):
    model = model.to(torch.bfloat16)
    want = model(IDS).logits
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.float32
    torch.testing.assert_close(prepared(IDS).logits, want.float(), atol=0.05, rtol=0.05)
    loss(get_peft_model(prepared, LoraConfig(r=4, target_modules="all-linear"))).backward()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_compute_the_same(model, where, tmp_path):
    want = model(IDS).logits
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.qweight.is_meta
    torch.testing.assert_close(model(IDS).logits, want)
    assert model.model.layers[0].mlp.up_proj.qweight.is_meta
