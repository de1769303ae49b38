"""What stands around the packed tensors in a transformers checkpoint: a tripwire, and a seal over all of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.checkpoint import packed_modules
from hf_quant.errors import CheckpointError
from hf_quant.integrity import Stored, check_index, config_crc, seal, verify, verify_config
from hf_quant.runtime.stand_in import StandIn


def tripwire(model: nn.Module) -> dict[str, Tensor]:
    """One tensor of one element, named like a float weight that a quantized module stands for.

    A library without us takes packed tensors for surplus and would leave the weights random; the wrong shape of this
    one makes it stop instead.
    """
    name = next(iter(_stood_for(model)), None)
    return {} if name is None else {name: torch.zeros(1, dtype=torch.uint8)}


def ignore_tripwire(model: nn.Module) -> None:
    """Tell transformers that the surplus weights of our layers are meant to be there."""
    names = set(_stood_for(model))
    prefix = getattr(model, "base_model_prefix", "")
    names |= {f"{prefix}.{n}" for n in names} | {n.removeprefix(f"{prefix}.") for n in names}
    known: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{n}$".replace(".", r"\.") for n in sorted(names))}  # type: ignore[assignment]


def _stood_for(model: nn.Module) -> list[str]:
    """Names of the float weights that the quantized modules stand for, in the order of their use as a tripwire.

    Stand-ins come last, by the name of a weight of what they stand in for: the names of their members mean nothing to
    stock code, and those of a tied head are not looked for in a checkpoint.
    """
    tied = {key.rpartition(".")[0] for key in getattr(model, "all_tied_weights_keys", {})}
    names = [name for name, _ in packed_modules(model) if name not in tied]
    apart = {
        n: m.stock_weight
        for n, m in model.named_modules()
        if isinstance(m, StandIn) and any(x.startswith(n + ".") for x in names)
    }
    alone = [n for n in names if not any(n.startswith(a + ".") for a in apart)]
    return [f"{n}.weight" for n in alone] + [f"{n}.{weight}" for n, weight in apart.items()]


def sealed_state(model: Any) -> tuple[dict[str, Tensor], dict[str, str], int | None]:  # noqa: ANN401  a PreTrainedModel
    """(what to save, safetensors metadata, crc of the config): with the tripwire, and the seal over what is written."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = {**model.state_dict(), **tripwire(model)}
    kept = {k: v for k, v in state.items() if k not in (model._keys_to_ignore_on_save or ())}
    kept = remove_tied_weights_from_state_dict(kept, model)
    if any(t.is_meta or hasattr(t, "to_local") for t in kept.values()):
        return state, {}, None  # offloaded or sharded: the bytes are not here to be summed
    model.config.dtype = str(model.dtype).removeprefix("torch.")  # as save_pretrained is about to do
    config = json.loads(model.config.to_json_string(use_diff=True))
    return state, seal(kept, revert_weight_conversion(model, dict(kept)), config=config), config_crc(config)


def open_seal(files: Sequence[str], *, sealed: bool) -> dict[str, Stored]:
    """Check the files of a checkpoint and the config beside them.

    Raises:
        CheckpointError: anything differs from what was saved.
    """
    return verify(files, config=_read_config(Path(files[0]).parent), sealed=sealed)


def check_config(folder: str, sealed: int | None) -> None:
    """As far as they lie in a local folder, check config.json and the index before a model is built to their measures.

    Raises:
        CheckpointError: the config is not the one that was saved, or the index is damaged.
    """
    if folder:
        check_index(Path(folder))
    config = None if sealed is None or not folder else _read_config(Path(folder))
    ours = (config or {}).get("quantization_config")
    if config is not None and isinstance(ours, dict) and ours.get("sealed") == sealed:  # else of another model
        verify_config(Path(folder) / "config.json", config, sealed or 0)


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); get it again") from None
    return config


def check_loaded(model: nn.Module) -> None:
    """Every packed tensor was in the checkpoint.

    Raises:
        CheckpointError: naming the first that was not, which would hold arbitrary codes.
    """
    for name, module in packed_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False) and parameter.device.type != "meta":
                raise CheckpointError(f"{name}.{key} is not in the checkpoint; a shard is missing or damaged")
