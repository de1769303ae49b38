"""Finding and loading models and their processors, with one clear error for each way it can fail.

A path never touches the network. Only `user/name`, when no such folder exists, is a Hub id.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_quant.config import QuantConfig
from hf_quant.errors import CheckpointError, ConfigError, HfQuantError, UnsupportedModel
from hf_quant.integrations.sealing import check_config
from hf_quant.integrity import check_index

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OURS = "hf_quant"


def resolve(model: str | Path) -> str:
    """The folder, or the Hub id, that `model` names.

    Raises:
        CheckpointError: a path at which there is nothing, or a file.
        UnsupportedModel: a folder without config.json.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file():
            part = next((n for n in ("transformer", "unet") if (path / n).is_dir()), "unet")
            raise UnsupportedModel(
                f"{path} is a diffusers pipeline; name the folder of one part, such as {path / part}, or quantize it "
                "whole in Python: hf_quant.quantize(pipeline, config)"
            )
        if not (path / "config.json").is_file():
            raise UnsupportedModel(f"{path} holds no config.json, so it is not a model of transformers or diffusers")
        return str(path)
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the folder of the model")
    first = str(model).split("/")[0]
    if isinstance(model, str) and HUB_ID.fullmatch(model) and not Path(first).is_dir():
        return model
    raise CheckpointError(f"there is no folder {path} (for a model on the Hub write user/name)")


def read_config(model: str | Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        CheckpointError: not there, or not JSON.
        UnsupportedModel: a folder without it.
    """
    where = resolve(model)
    path = Path(where) / "config.json" if Path(where).is_dir() else _download(where, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}, not a JSON object")
    return config


def fetch(model: str | Path) -> Path:
    """The folder with the model's files: the local one, or the Hub's snapshot, downloaded when it is not cached."""
    where = resolve(model)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(where, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot get {where} from the Hub: {first_line(error)}") from error


def torch_dtype(name: str) -> torch.dtype:
    """The floating type with this name.

    Raises:
        ConfigError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {name!r}: float32, bfloat16 or float16")
    return found


def quantized_by(config: dict[str, Any]) -> str | None:
    """The library that quantized the model (`quant_method` of its config), or None for a float model.

    Raises:
        CheckpointError: `quantization_config` is there and no object.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json is damaged: its quantization_config is {found!r}")
    return str(found.get("quant_method", "an unnamed library"))


def require_float(config: dict[str, Any], model: str | Path) -> None:
    """Refuse a model that is quantized already.

    Raises:
        UnsupportedModel: says by which library.
    """
    by = quantized_by(config)
    if by is not None:
        who = "hf-quant" if by == OURS else f"another library (quant_method {by!r})"
        raise UnsupportedModel(f"{model} is already quantized, by {who}; start from the full-precision model")


def require_ours(config: dict[str, Any], model: str | Path) -> None:
    """Refuse a model that hf-quant did not quantize.

    Raises:
        UnsupportedModel: it is a float model, or another library's (says which).
    """
    by = quantized_by(config)
    if by is None:
        raise UnsupportedModel(f"{model} is not quantized; quantize it with: hf-quant quantize {model} OUT")
    if by != OURS:
        raise UnsupportedModel(f"{model} was quantized by another library (quant_method {by!r}), not by hf-quant")


def skeleton(model: str | Path) -> nn.Module:
    """The model on the meta device: built from its config alone, no weight is read.

    Raises:
        CheckpointError, UnsupportedModel: see `resolve`; or no known architecture.
    """
    where = resolve(model)
    data = read_config(where)
    if "_class_name" in data:
        cls = _diffusers_class(data)
        with torch.device("meta"):
            built: nn.Module = cls.from_config(data)
        return built
    config = _transformers_config(where)
    cls = _transformers_class(config, where)
    with torch.device("meta"):
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        return cls._from_config(config, dtype=dtype)  # type: ignore[no-any-return]


def load_model(
    model: str | Path,
    config: QuantConfig | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> nn.Module:
    """A model by the class its config names, ready to run.

    Args:
        model: folder or Hub id.
        config: quantize it while loading.
        dtype: of the weights that stay in floating point; "auto" is what the config says.
        device: where to put it; None: the CPU.

    Raises:
        CheckpointError: nothing there, a damaged file (it is named), or a version we do not know.
        UnsupportedModel: no model, an unknown architecture, or (with `config`) quantized already.
    """
    where = resolve(model)
    data = read_config(where)
    quantized_by(data)  # refuses a damaged one
    if config is not None:
        require_float(data, model)
    local = Path(where).is_dir()
    if local:
        check_files(Path(where))
        check_config(str(where), (data.get("quantization_config") or {}).get("sealed"))
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    try:
        if "_class_name" in data:
            torch_dtype = None if dtype == "auto" else dtype
            cls = _diffusers_class(data)
            loaded = cls.from_pretrained(where, torch_dtype=torch_dtype, local_files_only=local, **options)
        else:
            known = _transformers_config(where)  # knows its folder, so a damaged one is refused before it sizes a model
            cls = _transformers_class(known, where)
            loaded = cls.from_pretrained(where, config=known, dtype=dtype, local_files_only=local, **options)
    except HfQuantError:
        raise
    except Exception as error:  # whatever a damaged file makes go wrong inside a library
        raise CheckpointError(f"cannot load {model}: {first_line(error)}") from error
    if device is not None:
        loaded = loaded.to(device)
    return loaded.eval()  # type: ignore[no-any-return]


def load_processor(model: str | Path) -> Any:  # noqa: ANN401  a tokenizer or a processor, of any class
    """The processor (or tokenizer) that lies beside a model; None when there is none."""
    from transformers import AutoProcessor, AutoTokenizer

    where = resolve(model)
    local = Path(where).is_dir()
    names = [p.name for p in Path(where).iterdir()] if local else ["tokenizer_config.json"]
    auto = AutoProcessor if {"processor_config.json", "preprocessor_config.json"} & set(names) else AutoTokenizer
    if auto is AutoTokenizer and not any(n.startswith(("tokenizer", "vocab", "spiece", "spm")) for n in names):
        return None
    try:
        return auto.from_pretrained(where, local_files_only=local)
    except Exception as error:  # as above
        raise CheckpointError(f"cannot load the tokenizer of {model}: {first_line(error)}") from error


def check_files(folder: Path) -> None:
    """Every weight file there is, and whole: what its header promises lies in it.

    Raises:
        CheckpointError: names the first file that is missing, truncated or no safetensors.
        UnsupportedModel: no weights in the folder.
    """
    check_index(folder)
    files = [p for p in folder.glob("*.safetensors") if p.is_file()]
    if not files and not list(folder.glob("*.bin")):
        raise UnsupportedModel(f"{folder} holds no weights (no .safetensors file)")
    for file in sorted(files):
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """The header is JSON and the tensors it lists end where the file ends.

    Raises:
        CheckpointError: they do not.
    """
    there = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > there - 8:
                raise CheckpointError(f"{file} is truncated: its header alone is {length} bytes, the file {there}")
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        wanted = 8 + length + int(end)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(f"{file} is no safetensors file: its header cannot be read") from None
    if there < wanted:
        raise CheckpointError(f"{file} is truncated: {there} bytes of {wanted}; copy or download it again")


def _transformers_config(where: str) -> Any:  # noqa: ANN401
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where, local_files_only=Path(where).is_dir())
    except HfQuantError:
        raise
    except Exception as error:  # its own validation raises errors of many kinds
        raise UnsupportedModel(f"{where}: transformers does not know this model: {first_line(error)}") from error


def _transformers_class(config: Any, where: str) -> Any:  # noqa: ANN401
    """The class that `architectures` names; for a config without it, the causal or the base model of its type."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is None:
            raise UnsupportedModel(
                f"{where} has the architecture {name}, which this transformers ({transformers.__version__}) does not "
                "have; code that comes with a model is never run"
            )
        return found
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UnsupportedModel(f"{where}: config.json names no architecture")


def _diffusers_class(data: dict[str, Any]) -> Any:  # noqa: ANN401
    try:
        import diffusers
    except ImportError:
        raise UnsupportedModel("this is a diffusers model: pip install 'hf-quant[diffusers]'") from None
    found = getattr(diffusers, str(data["_class_name"]), None)
    if found is None:
        raise UnsupportedModel(f"diffusers {diffusers.__version__} has no class {data['_class_name']!r}")
    return found


def _download(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot get {name} of {repo} from the Hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else ""
    explicit = isinstance(error, OSError | ValueError | RuntimeError)
    return told if told and explicit else f"{type(error).__name__}: {told}"
