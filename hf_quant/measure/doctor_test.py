"""The doctor finds what was put there: outlier channels, a spoilt layer; and leaves the patient as it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, RunError, UnsupportedModel
from hf_quant.measure.doctor import Diagnosis, diagnose
from hf_quant.measure.switches import Patient
from hf_quant.spec import act_spec
from hf_quant.testing import inject_outliers
from hf_quant.testing.judge import Judge

DATA = Path(__file__).parents[2] / "examples" / "data"


def patient(tiny_lm_path: Path) -> nn.Module:
    """Two blocks of the trained model are enough to be ill in."""
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32, num_hidden_layers=2)
    model._keys_to_ignore_on_load_unexpected = None
    return model


def ids() -> np.ndarray:
    return np.load(DATA / "tiny_test.npy")[:512].astype(np.int64)


def examine(model: nn.Module, config: QuantConfig | None = None, **options: object) -> Diagnosis:
    return diagnose(
        model,
        ids(),
        config or QuantConfig("rtn", bits=8),
        window=128,
        tokens=256,
        progress=False,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def healthy(tiny_lm_path: Path) -> Diagnosis:
    return examine(patient(tiny_lm_path), inputs=act_spec(6))


def test_switches_add_up(healthy: Diagnosis) -> None:
    assert healthy.off == 0
    assert 0 < healthy.weights < healthy.inputs, "8-bit weights cost less than 6-bit inputs"
    assert healthy.both > healthy.weights
    assert len(healthy.sites) == 14
    assert 0 < healthy.without_worst < healthy.both
    assert [b.name for b in healthy.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(0 < b.error < 1 for b in healthy.blocks)
    assert json.loads(json.dumps(healthy.to_json()))["off"] == 0


def test_injected_outliers_are_found_by_channel(tiny_lm_path: Path, healthy: Diagnosis) -> None:
    model = patient(tiny_lm_path)
    channels = inject_outliers(model, {"input_ids": torch.arange(48).reshape(2, 24)}).tolist()
    ill = examine(model, inputs=act_spec(6))
    assert set(channels) <= set(ill.outlier_channels)
    assert not set(channels) <= set(healthy.outlier_channels)
    assert ill.inputs > 2 * healthy.inputs
    assert any("Outlier channels" in s and "smoothquant" in s for s in ill.verdict)


def test_a_layer_that_does_not_round_well_is_named(tiny_lm_path: Path) -> None:
    model = patient(tiny_lm_path)
    spoilt = "model.layers.1.mlp.gate_proj"
    weight = model.get_submodule(spoilt).weight
    with torch.no_grad():
        weight[:, 3] = 4.0  # stretches every group's range, and its input is almost nothing
        model.get_submodule("model.layers.1.post_attention_layernorm").weight[3] *= 1e-4
    found = examine(model, QuantConfig("rtn", bits=4))
    assert found.worst[0] == spoilt
    assert max(found.sites, key=lambda s: s.weights).name == spoilt
    assert any("comes from the weights" in s for s in found.verdict)


def test_calibration_sets_are_compared_and_a_killed_run_goes_on(
    tiny_lm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patient(tiny_lm_path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    notes = tmp_path / "notes.jsonl"
    config = QuantConfig("gptq", bits=3, group_size=64, clip_steps=1, calibration=DATA / "tiny_calib.npy")
    found = examine(model, config, sets=2, samples=4, resume=notes)
    assert len(found.sets) == 2
    assert found.sets[0] != found.sets[1]
    assert any("2 calibration sets" in s for s in found.verdict)
    assert all(t.equal(before[n]) for n, t in model.state_dict().items())
    lines = notes.read_text().splitlines()
    notes.write_text("\n".join(lines[:20]) + '\n{"half')
    measured: list[int] = []
    kl = Patient.kl
    monkeypatch.setattr(Patient, "kl", lambda *a: measured.append(1) or kl(*a))
    assert examine(model, config, sets=2, samples=4, resume=notes) == found
    assert 0 < len(measured) < len(lines)
    with pytest.raises(RunError, match="another examination"):
        examine(model, QuantConfig("rtn", bits=4), resume=notes)


def test_a_vision_transformer_is_examined_from_a_file_of_its_inputs(
    judges: Callable[[str], Judge], tmp_path: Path
) -> None:
    """Classes instead of tokens: the same figures but for the perplexity; calibration sets are made of its batches."""
    vit = judges("digits-vit")
    pixels = vit.calibration.contiguous()
    save_file({"pixel_values": pixels[:64]}, tmp_path / "calib.safetensors")
    save_file({"pixel_values": vit.test[:32].contiguous()}, tmp_path / "test.safetensors")
    config = QuantConfig("gptq", bits=3, clip_steps=1, calibration=tmp_path / "calib.safetensors")
    found = diagnose(vit.model(), tmp_path / "test.safetensors", config, sets=2, progress=False)
    assert found.perplexity is None
    assert found.off == 0
    assert found.weights > found.inputs > 0
    assert len(found.sets) == 2
    assert found.sets[0] != found.sets[1]
    assert len(found.sites) == 36
    assert 0 < found.without_worst < found.both

    halves = [[{"pixel_values": part} for part in half.split(8)] for half in pixels[:64].split(32)]
    for kl, half in zip(found.sets, halves, strict=True):  # the KL is the judge's, on the same pictures
        model = vit.model()
        hf_quant.quantize(model, QuantConfig("gptq", bits=3, clip_steps=1), data=half, progress=False)
        assert replace(vit, test=vit.test[:32], _expected=None).distance(model)[0] == pytest.approx(kl, rel=1e-3)


def test_convolutions_are_examined_too() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 7}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).train()
    pictures = [{"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}]
    found = diagnose(model, pictures, QuantConfig("rtn", bits=3), progress=False)
    assert len(found.sites) == 9
    assert found.weights > found.off == 0
    assert model.training
    assert all(type(m) is nn.Conv2d for n, m in model.named_modules() if n.endswith("convolution"))


def test_tokens_are_no_pictures(judges: Callable[[str], Judge]) -> None:
    with pytest.raises(CalibrationError, match=r"ViTForImageClassification takes pixel_values .* input_ids"):
        examine(judges("digits-vit").model())


def test_a_model_that_wants_more_than_the_data_gives_is_told_what_it_was_given() -> None:
    parts = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    words, pictures = {**parts, "vocab_size": 96}, {**parts, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=pictures, projection_dim=32)).eval()
    half = [{"pixel_values": torch.randn(2, 3, 16, 16)}]
    with pytest.raises(CalibrationError, match=r"CLIPModel cannot run on a batch of the data \(pixel_values \[2, 3, "):
        diagnose(model, half, QuantConfig("rtn", group_size=32), progress=False)
    whole = [{**half[0], "input_ids": torch.randint(3, 90, (2, 5))}]
    with pytest.raises(UnsupportedModel, match="CLIPModel gives no logits"):
        diagnose(model, whole, QuantConfig("rtn", group_size=32), progress=False)


def test_methods_that_rewrite_the_model_are_refused(tiny_lm_path: Path) -> None:
    with pytest.raises(ConfigError, match="rewrites the model"):
        examine(patient(tiny_lm_path), QuantConfig("smoothquant"))
