"""Every way a model can fail to be there is one clear error, and no path ever becomes a download."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from hf_quant import loading
from hf_quant.errors import CheckpointError, ConfigError, HfQuantError, UnsupportedModel


@pytest.fixture
def copy(tiny_lm_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_lm_path, tmp_path / "model"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"something wanted the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    "missing", ["nope", "./no/such", "/no/such", "~/no-such-folder", "a/b/c", "dir/", "hf_quant/x"]
)
@pytest.mark.usefixtures("_no_network")
def test_a_missing_path_is_an_error_not_a_download(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf_quant").mkdir()
    for call in (loading.resolve, loading.read_config, loading.skeleton, loading.load_model, loading.load_processor):
        with pytest.raises(CheckpointError, match="no folder"):
            call(missing)


def test_only_user_slash_name_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loading.resolve("user/name-1.5B") == "user/name-1.5B"
    with pytest.raises(CheckpointError):
        loading.resolve(Path("user/name"))


@pytest.mark.usefixtures("_no_network")
def test_the_skeleton_reads_no_weight(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    model = loading.skeleton(copy)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert str(next(model.parameters()).dtype) == "torch." + json.loads((copy / "config.json").read_text())["dtype"]


@pytest.mark.usefixtures("_no_network")
def test_the_model_and_its_tokenizer_load_without_the_network(copy: Path) -> None:
    model, tokenizer = loading.load_model(copy), loading.load_processor(copy)
    assert not model.training
    assert tokenizer("hello")["input_ids"]
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert loading.load_processor(copy) is None


def test_what_is_no_model_is_said_to_be_none(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        loading.resolve(copy / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        loading.load_model(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="no weights"):
        loading.load_model(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        loading.load_model(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        loading.load_model(copy)


def test_a_pipeline_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="diffusers pipeline"):
        loading.load_model(tmp_path)


def test_an_unknown_architecture_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["NeverHeardOf"]}))
    with pytest.raises(UnsupportedModel, match="NeverHeardOf"):
        loading.skeleton(copy)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "never-heard-of"}))
    with pytest.raises(UnsupportedModel, match="never-heard-of"):
        loading.skeleton(copy)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_a_truncated_file_is_named(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|no safetensors file)"):
        loading.load_model(copy)


def test_a_shard_that_is_not_there_is_named(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        loading.load_model(copy)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        loading.load_model(copy)


def test_another_librarys_model_says_which() -> None:
    foreign = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UnsupportedModel, match=r"another library.*'gptq'"):
        loading.require_float(foreign, "x")
    with pytest.raises(UnsupportedModel, match=r"another library.*'gptq'"):
        loading.require_ours(foreign, "x")
    with pytest.raises(UnsupportedModel, match="by hf-quant"):
        loading.require_float({"quantization_config": {"quant_method": "hf_quant"}}, "x")
    with pytest.raises(UnsupportedModel, match="is not quantized"):
        loading.require_ours({}, "x")
    loading.require_float({}, "x")
    loading.require_ours({"quantization_config": {"quant_method": "hf_quant"}}, "x")


def test_types_by_name() -> None:
    assert loading.torch_dtype("bfloat16") is torch.bfloat16
    for wrong in ("int8", "nn", "double-double"):
        with pytest.raises(ConfigError, match=wrong):
            loading.torch_dtype(wrong)
    assert issubclass(ConfigError, HfQuantError)
