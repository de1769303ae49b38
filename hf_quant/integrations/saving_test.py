"""What lies beside a saved model tells of that model, and of none that was there before."""

from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedModel

import hf_quant
from hf_quant import QuantConfig
from hf_quant.testing.subjects import SUBJECTS


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def model() -> nn.Module:
    made = SUBJECTS["llm"].model(1)
    hf_quant.quantize(made, QuantConfig("rtn", bits=4, group_size=32), progress=False)
    return made


def test_a_float_model_in_the_place_of_a_quantized_one(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {"README.md", "report.json", "report.html", "layers.png"} < names(tmp_path)
    hf_quant.dequantize(model).save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", "generation_config.json", "model.safetensors"}


def test_what_others_wrote_stays(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "report-of-mine.json").write_text("{}")
    hf_quant.dequantize(model).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "report-of-mine.json" in names(tmp_path)
    assert not {"report.json", "report.html"} & names(tmp_path)


def test_an_adapter_beside_a_quantized_model_takes_nothing_away(model: PreTrainedModel, tmp_path: Path) -> None:
    from peft import LoraConfig

    model.save_pretrained(tmp_path)
    before = names(tmp_path)
    trained = hf_quant.dequantize(model)
    trained.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trained.save_pretrained(tmp_path)
    assert names(tmp_path) == before | {"adapter_config.json", "adapter_model.safetensors"}
