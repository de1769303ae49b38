"""`finetune`, from Python and from the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import hf_quant
from hf_quant import QuantConfig
from hf_quant.cli.app import app
from hf_quant.errors import NotSupported, UnsupportedModel, UnsupportedSpec
from hf_quant.every_method_test import llama, tokens
from hf_quant.recipe import Job, Recipe
from hf_quant.spec import act_spec, int_spec


def test_only_methods_that_train(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=r"use a method that does .*or quantize the model and train an adapter"):
        hf_quant.finetune(llama(), QuantConfig("gptq"), tokens())
    model = llama()
    report = hf_quant.finetune(model, QuantConfig("lr-qat", bits=3, steps=2), tokens(), progress=False)
    assert report.training["steps"] == 2
    assert report.training["tokens"] == 2 * 8 * 32
    with pytest.raises(UnsupportedModel, match="train an adapter on it"):
        hf_quant.finetune(model, QuantConfig("lr-qat"), tokens())


def test_what_the_loop_cannot_train_is_refused_before_work() -> None:
    trainer = QuantConfig("lsq").quantizer().trainer
    with pytest.raises(UnsupportedSpec, match="cannot have inputs too"):
        Recipe(weights=int_spec(4), inputs=act_spec(), trainer=trainer).quantize(llama(), Job(data=tokens()))


def test_a_model_with_transposed_weights() -> None:
    """GPT-2: what was trained is what runs."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    before = {n: p.requires_grad for n, p in model.named_parameters() if "wte" in n}
    report = hf_quant.finetune(model, QuantConfig("lsq", bits=4, group_size=32, steps=2), tokens(), progress=False)
    assert all(e.error < 0.05 for e in report.quantized)
    assert {n: p.requires_grad for n, p in model.named_parameters() if "wte" in n} == before
    assert not any("parametrizations" in n for n, _ in model.named_modules())


def test_command(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", tokens().numpy())
    given = ["finetune", str(tmp_path / "model"), str(tmp_path / "out"), str(tmp_path / "ids.npy")]
    refused = CliRunner().invoke(app, [*given, "-m", "gptq"])
    assert isinstance(refused.exception, NotSupported)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*given, "-b", "3", "-g", "32", "--set", "steps=2"])
    assert done.exit_code == 0, done.output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.hf_quantizer.quantization_config.method == "lr-qat"
