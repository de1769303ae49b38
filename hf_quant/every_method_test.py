"""What every registered method owes, whoever wrote it: being registered means being covered."""

import importlib
import inspect
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaConfig, ViTConfig

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError
from hf_quant.method import DOMAINS, Method, list_methods
from hf_quant.recipe import HfQuantizer

METHODS = list_methods()
each_method = pytest.mark.parametrize("method", METHODS, ids=[m.id for m in METHODS])
SECONDS = 2.0  # of CPU, for the tiny model: a method that needs more on 100 thousand weights is no use on billions


def llama() -> nn.Module:
    """Two layers of random weights, with grouped queries; 64 divides every width, as bitsandbytes demands."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


def vit() -> nn.Module:
    """Two layers of a random vision transformer: biases, LayerNorm, a classifier."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model: nn.Module = AutoModelForImageClassification.from_config(config).eval()
    return model


def tokens() -> Tensor:
    return torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(1))


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(2)]


def quantized(method: Method, model: nn.Module, data: Any) -> nn.Module:
    hf_quant.quantize(model, QuantConfig(method.id), data=data, progress=False)
    return model


@each_method
def test_it_says_what_it_is(method: Method) -> None:
    """The file's header holds the paper, the shapes and the differences; the claim is a sentence."""
    header = inspect.getdoc(importlib.import_module(method.build.__module__)) or ""
    assert "Shapes:" in header
    assert "Differs from the paper:" in header
    assert method.paper.arxiv is None or f"arXiv:{method.paper.arxiv}" in header
    assert method.paper.title
    assert method.build.__doc__
    assert method.domains
    assert method.domains <= DOMAINS
    assert len(method.claim.split()) >= 4
    assert method.id == method.id.lower()


@each_method
def test_its_signature_is_its_configuration(method: Method) -> None:
    """Every parameter is named, typed, has a default, and survives JSON; the recipe is a value."""
    for parameter in method.signature.parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation is not inspect.Parameter.empty
    defaults = {n: p.default for n, p in method.signature.parameters.items()}
    assert json.loads(json.dumps(defaults)) == defaults
    config = QuantConfig(method.id, **defaults)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    recipe = config.quantizer()
    assert isinstance(recipe, HfQuantizer)
    assert recipe == QuantConfig(method.id).quantizer()
    assert hash(recipe) == hash(QuantConfig(method.id).quantizer())


@each_method
def test_impossible_arguments_are_refused_at_construction(method: Method) -> None:
    impossible = {"bits": (0, 9, -3, 2.5, "4"), "group_size": (0, -2, 1.5, "128"), "damp": (0, 2.0, -0.1)}
    for name in method.signature.parameters:
        for value in impossible.get(name, ()):
            with pytest.raises(ConfigError):
                QuantConfig(method.id, **{name: value})
    with pytest.raises(ConfigError, match="no argument"):
        QuantConfig(method.id, no_such_argument=1)


@each_method
@torch.no_grad()
def test_it_quantizes_saves_and_loads_back_the_same(method: Method, tmp_path: Path) -> None:
    """A language model in seconds, twice the same; loaded back it computes the same."""
    if not method.domains & {"llm", "moe"}:
        pytest.skip(f"for {sorted(method.domains)}")
    ids = tokens()
    quantized(method, llama(), ids)  # what the first run compiles or imports is not the method's own time
    started = time.process_time()
    model = quantized(method, llama(), ids)
    seconds = time.process_time() - started
    logits = model(ids).logits
    assert seconds < SECONDS * torch.get_num_threads()
    assert logits.isfinite().all()
    assert not logits.equal(llama()(ids).logits)
    assert logits.equal(quantized(method, llama(), ids)(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded(ids).logits.equal(logits)


@each_method
@torch.no_grad()
def test_a_vision_model_too(method: Method, tmp_path: Path) -> None:
    if "vit" not in method.domains:
        pytest.skip(f"for {sorted(method.domains)}")
    batch = images()[0]
    model = quantized(method, vit(), images())
    logits = model(**batch).logits
    assert logits.isfinite().all()
    assert not logits.equal(vit()(**batch).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded(**batch).logits.equal(logits)
