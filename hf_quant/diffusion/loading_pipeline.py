"""Loading pipelines of diffusers, with one clear error for each way it can fail.

A path never touches the network. Only `user/name`, when no such folder exists, is a Hub id.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_quant.diffusion.drawing import name_of_backbone
from hf_quant.errors import CheckpointError, HfQuantError, UnsupportedModel
from hf_quant.loading import HUB_ID, check_files, first_line, resolve

INDEX = "model_index.json"


def is_pipeline(model: str | Path) -> bool:
    """Whether a folder, or a repository on the Hub, holds a pipeline; asks the Hub for Hub ids alone."""
    path = Path(model).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(model)):
        return (path / INDEX).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(str(model), INDEX)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return False
    return True


def draws(model: str | Path) -> bool:
    """Whether it is a pipeline, or the folder of the network of one."""
    if is_pipeline(model):
        return True
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "_class_name" in config


def load_pipeline(model: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401  of any class
    """A pipeline, ready to draw.

    Args:
        model: folder or Hub id.
        device: where to put it; None: the CPU.
        dtype: what it computes in; None: float32, whatever type its files hold.

    Raises:
        CheckpointError: nothing there, or a damaged file (it is named).
        UnsupportedModel: no pipeline, or diffusers is missing.
    """
    try:
        from diffusers import DiffusionPipeline, __version__
    except ImportError:
        raise UnsupportedModel("a pipeline needs diffusers: pip install 'hf-quant[diffusers]'") from None
    path = Path(model).expanduser()
    if not is_pipeline(model):
        raise UnsupportedModel(f"{resolve(model)} is one model, not a pipeline: it has no {INDEX}")
    for part in parts(path) if path.is_dir() else ():
        if (path / part / "config.json").is_file():
            check_files(path / part)
    try:
        local = path.is_dir()
        named = "torch_dtype" if __version__.startswith("0.39") else "dtype"
        options = {named: dtype or torch.float32}  # else text encoders are of the type of their files, others are not
        loaded = DiffusionPipeline.from_pretrained(str(path if local else model), local_files_only=local, **options)
    except HfQuantError:
        raise
    except Exception as error:  # whatever a damaged file makes go wrong inside a library
        raise CheckpointError(f"cannot load {model}: {first_line(error)}") from error
    return loaded if device is None else loaded.to(device)


def parts(folder: Path) -> list[str]:
    """The components that its index names and the folder has.

    Raises:
        CheckpointError: an index that is no JSON object.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [name for name in index if (folder / name).is_dir()]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from None


def bytes_on_disk(folder: Path) -> int:
    """Of the weight files of a pipeline's components, or of one model."""
    folders = [folder / p for p in parts(folder)] if (folder / INDEX).is_file() else [folder]
    return sum(p.stat().st_size for f in folders for p in f.glob("*.safetensors"))


def with_network(pipeline: Any, network: nn.Module) -> Any:  # noqa: ANN401
    """The pipeline with another network in place of its own; the other components are shared.

    Raises:
        UnsupportedModel: it has none of this class.
    """
    name = name_of_backbone(pipeline)
    if type(getattr(pipeline, name)) is not type(network):
        raise UnsupportedModel(
            f"{type(network).__name__} does not fit into {type(pipeline).__name__}, whose {name} is a "
            f"{type(getattr(pipeline, name)).__name__}"
        )
    return type(pipeline)(**{**pipeline.components, name: network})
