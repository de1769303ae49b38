"""What a user calls on models, where no other test looks."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, UnsupportedModel

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(params=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    if request.param == "dense":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(torch.bfloat16)
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4)).to(torch.bfloat16)


def test_an_estimate_is_what_is_then_made_and_touches_nothing(model: torch.nn.Module, tmp_path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = QuantConfig("rtn", bits=3, group_size=16)
    found = hf_quant.estimate(model, config)
    assert found == hf_quant.estimate(tmp_path, config), "of a model as of its config alone"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hf_quant.quantize(model, config)
    assert found["bits_per_weight"] == pytest.approx(hf_quant.true_bits(model), rel=1e-12)
    assert found["sites"] == len(hf_quant.explain(model))
    assert found["original_bytes"] == sum(t.numel() * t.element_size() for t in before.values())


def test_what_is_quantized_is_not_estimated_again(model: torch.nn.Module, tmp_path: Path) -> None:
    hf_quant.quantize(model, QuantConfig("rtn", group_size=16))
    model.save_pretrained(tmp_path)
    for there in (model, tmp_path):
        with pytest.raises(UnsupportedModel, match="already"):
            hf_quant.estimate(there, QuantConfig("rtn"))
    with pytest.raises(ConfigError, match="takes a QuantConfig, not str"):
        hf_quant.estimate(tmp_path, "rtn")  # type: ignore[arg-type]


def test_an_estimate_says_whether_data_is_needed(model: torch.nn.Module) -> None:
    assert not hf_quant.estimate(model, QuantConfig("rtn", group_size=16))["needs_calibration"]
    assert hf_quant.estimate(model, QuantConfig("gptq", group_size=16))["needs_calibration"]
    mixed = QuantConfig("rtn", group_size=16, overrides={"*.0.self_attn.q_proj": {"method": "gptq"}})
    assert hf_quant.estimate(model, mixed)["needs_calibration"]


@torch.no_grad()
def test_dequantized_into_another_type_a_model_still_runs(model: torch.nn.Module) -> None:
    tokens = torch.arange(24).reshape(1, 24)
    hf_quant.quantize(model, QuantConfig("rtn", group_size=16))
    expected = model.eval()(tokens).logits.float()
    plain = hf_quant.dequantize(model, torch.float32)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    found = plain(tokens).logits
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.03  # bfloat16's own error


@torch.no_grad()
def test_a_quantized_model_is_pickled_whole(model: torch.nn.Module) -> None:
    tokens = torch.arange(24).reshape(1, 24)
    hf_quant.quantize(model, QuantConfig("rtn", group_size=16))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.quantization_config == model.config.quantization_config


@torch.no_grad()
def test_a_part_that_is_saved_alone_loads(tmp_path: Path) -> None:
    tokens = torch.arange(24).reshape(1, 24)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    hf_quant.quantize(model, QuantConfig("rtn", group_size=16))
    config = model.config.quantization_config
    model.model.save_pretrained(tmp_path / "part")
    assert model.config.quantization_config is config
    part = AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(part(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert part.hf_quantizer.quantization_config.made_by == config.made_by
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_part_with_a_config_of_its_own_says_that_it_is_quantized(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})).eval()
    hf_quant.quantize(model, QuantConfig("rtn", group_size=16))
    tower = model.vision_model
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    again = type(tower).from_pretrained(tmp_path)
    assert torch.equal(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    assert not hasattr(tower.config, "quantization_config")


def test_what_is_compiled_already_is_refused(model: torch.nn.Module) -> None:
    """Its layers are named otherwise, so the saved model would not load."""
    with pytest.raises(UnsupportedModel, match=r"torch\.compile"):
        hf_quant.quantize(torch.compile(model, backend="eager"), QuantConfig("rtn", group_size=16))
    assert not hasattr(model, "hf_quantizer")


def test_texts_are_read_by_the_tokenizer_beside_the_model(tiny_lm_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_lm_path)
    with pytest.raises(CalibrationError, match="too short: 4 tokens"):
        hf_quant.quantize(model, QuantConfig("gptq"), data=["a list of numbers"])


def test_what_an_interrupted_run_left_is_not_quantized_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of it would be, at other bits perhaps, and the report would know of the rest alone."""
    model, blocks = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)), []

    def stop(*_: object) -> None:
        blocks.append(1)
        if len(blocks) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_quant.running.run_dir.RunDir.save", stop)
    with pytest.raises(KeyboardInterrupt):
        hf_quant.quantize(model, QuantConfig("rtn", bits=4, group_size=16), progress=False)
    for call in (hf_quant.quantize, hf_quant.finetune):
        with pytest.raises(
            UnsupportedModel, match=r"q_proj is quantized already.*interrupted.*Load the original again"
        ):
            call(model, QuantConfig("lsq", bits=3, group_size=16, steps=1), data=torch.arange(16).reshape(2, 8))
