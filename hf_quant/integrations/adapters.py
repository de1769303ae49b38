"""An adapter remembers the quantized base it was trained on, and is refused on another one.

PEFT offers no place for it, so saving (by `PeftModel`, or by a model of transformers with adapters) writes
`hf_quant.json` beside the adapter, and what loads one onto a quantized model reads it: `PeftModel`, transformers'
`load_adapter`, and hot-swapping. The adapter stays an ordinary PEFT folder, for float models too.
"""

import functools
import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.peft_model import PeftModel
from peft.utils import hotswap
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from hf_quant.errors import UnsupportedModel
from hf_quant.integrations.merging import before_merge
from hf_quant.runtime.packed import Packed, local

FILE = "hf_quant.json"
_log = logging.getLogger("hf_quant")


def identity(model: nn.Module) -> dict[str, Any]:
    """What an adapter of this model depends on: shapes and specs of the packed layers, and a checksum of their codes.

    The checksum is of the first 4 KiB of each layer's tensors: enough to tell two models apart, cheap for large ones.
    While adapters are merged it is of what they were trained on.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers: dict[str, list[Any]] = {}
    crc, before = 0, before_merge(model)
    for name, module in base.named_modules():
        if isinstance(module, Packed):
            key = name.replace(".base_layer", "")
            layers[key] = [list(module.matrix_shape), module.format.id, module.layer.weights.to_json()]
            if not module.qweight.is_meta:
                codes = before.get(id(module), {}).get("qweight", module.qweight)
                start = local(codes).detach().flatten()[:1024].cpu().contiguous()
                crc = zlib.crc32(start.view(torch.uint8).numpy().tobytes(), crc)
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    return {
        "method": getattr(config, "method", None),
        "shapes": _digest({n: v[0] for n, v in layers.items()}),
        "specs": _digest(layers),
        "bits": sorted({f"{v[2]['grid'].get('bits', '?')} bits ({v[1]})" for v in layers.values()}),
        "codes": crc,
    }


def _digest(value: Any) -> int:  # noqa: ANN401  JSON
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def check(model: nn.Module, made_for: dict[str, Any], where: str) -> None:
    """Compare with what the adapter was made for.

    Raises:
        UnsupportedModel: another architecture, or the same one with other bits.
    """
    ours = identity(model)
    anyway = f"To load it all the same, delete {FILE} from its folder"
    if made_for.get("shapes") != ours["shapes"]:
        raise UnsupportedModel(
            f"the adapter {where} was trained on another base: its quantized layers have other names or shapes. "
            f"{anyway}"
        )
    if made_for.get("specs") != ours["specs"]:
        raise UnsupportedModel(
            f"the adapter {where} was trained on a base of {', '.join(made_for.get('bits', ['?']))} "
            f"({made_for.get('method')}), and this one has {', '.join(ours['bits'])} ({ours['method']}): it has "
            f"learned to make up for other rounding. Load the base it was trained on, or train it again. {anyway}"
        )
    if made_for.get("codes") != ours["codes"]:
        _log.warning("the adapter %s was trained on a base with other codes (another seed or other data)", where)


def wrap() -> None:
    """Wrap what saves and what loads, once."""
    if not hasattr(PeftModel.save_pretrained, "__wrapped_by_hf_quant__"):
        PeftModel.save_pretrained = _saving(PeftModel.save_pretrained)
        PeftModel.load_adapter = _loading(PeftModel.load_adapter, "model_id")
        PeftAdapterMixin.load_adapter = _loading(PeftAdapterMixin.load_adapter, "peft_model_id")
        hotswap.hotswap_adapter = _loading(hotswap.hotswap_adapter, "model_name_or_path")


def _has_packed(model: nn.Module) -> bool:
    return any(isinstance(m, Packed) for m in model.modules())


def leave_word(model: nn.Module, folder: Path) -> None:
    """Beside every adapter in a folder, of the quantized base that it was saved with."""
    if _has_packed(model):
        text = json.dumps(identity(model), indent=1) + "\n"
        for config in folder.glob("**/adapter_config.json"):
            config.with_name(FILE).write_text(text)


def _saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = save(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            leave_word(self, Path(save_directory))
        return result

    save_pretrained.__wrapped_by_hf_quant__ = True  # type: ignore[attr-defined]
    return save_pretrained


def _loading(load: Callable[..., Any], called: str) -> Callable[..., Any]:
    """A function of a model and of where an adapter lies, which the function calls `called`."""

    @functools.wraps(load)
    def load_adapter(model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        model_id = args[0] if args else kwargs.get(called)
        made_for = _read(str(model_id), kwargs) if model_id is not None and _has_packed(model) else None
        if made_for is not None:
            check(model, made_for, str(model_id))
        try:
            return load(model, *args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise UnsupportedModel(
                f"the adapter {model_id} was trained on another base, its matrices do not fit this one: "
                f"{str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else error}"
            ) from error

    return load_adapter


def _read(model_id: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What lies beside an adapter, in a folder or on the Hub; None for one that was not made on a quantized base."""
    folder = Path(model_id, kwargs.get("subfolder") or "")
    if folder.is_dir():
        path = folder / FILE
        if not path.is_file():
            return None
    else:
        from huggingface_hub import hf_hub_download

        wanted = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
        try:
            path = Path(hf_hub_download(model_id, FILE, **{k: kwargs[k] for k in wanted if k in kwargs}))
        except (OSError, ValueError):
            return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


wrap()
