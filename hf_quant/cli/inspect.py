"""`hf-quant inspect`: what is in a saved model, from its config and the headers of its files."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, pairs, show, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.config import QuantConfig


def command(model: o.Model, as_json: Json = False) -> None:
    """Show what a saved model holds.

    Method, formats, true bits and calibration come from config.json and file headers; no weight is read.

    [bold]Examples[/]

    \b
      hf-quant inspect OUT
      hf-quant inspect OUT --json | jq .bits_per_weight
      hf-quant inspect MODEL                     [dim]a model that is not quantized, or by another library[/]
    """
    found = inspect(model)
    show(found, as_json, lambda console: _draw(console, found))


def inspect(model: str | Path) -> dict[str, Any]:
    """What `hf-quant inspect --json` prints.

    Raises:
        CheckpointError, UnsupportedModel: see `loading.resolve`; a damaged file; a newer version.
    """
    from hf_quant.integrity import read_header
    from hf_quant.loading import OURS, check_files, fetch, quantized_by, read_config

    config = read_config(model)
    by = quantized_by(config)
    folder = fetch(model)
    check_files(folder)
    header = read_header(sorted(folder.glob("*.safetensors")))
    found: dict[str, Any] = {
        "model": str(model),
        "architecture": (config.get("architectures") or [config.get("_class_name")])[0],
        "quant_method": by,
        "bytes": sum(stored.end - stored.begin for stored in header.values()),
        "tensors": len(header),
    }
    if by != OURS:
        return found
    from hf_quant.config import QuantConfig

    saved = QuantConfig.from_dict(config["quantization_config"])
    layers = _layers(folder, saved)
    values = sum(prod(x["shape"]) for x in layers)
    return found | {
        "version": saved.version,
        "made_by": saved.made_by,
        "bits_per_weight": sum(x["bits"] * prod(x["shape"]) for x in layers) / values if values else None,
        "formats": dict(Counter(x["format"] for x in layers)),
        "layers": layers,
    }


def _layers(folder: Path, saved: "QuantConfig") -> list[dict[str, Any]]:
    """Each quantized layer: its shape, and what its description says is stored for it."""
    import torch

    from hf_quant.checkpoint import build_skeleton, packed_modules
    from hf_quant.ledger import site_bits
    from hf_quant.loading import skeleton
    from hf_quant.pages.describe import short_spec

    model = skeleton(folder)
    with torch.device("meta"):
        build_skeleton(model, saved.description, dtype=next(model.parameters()).dtype)
    return [
        {
            "name": name,
            "shape": list(module.matrix_shape),
            "bits": site_bits(module) / prod(module.matrix_shape),
            "format": module.format.id,
            "weights": short_spec(module.layer.weights.to_json()),
            "inputs": short_spec(module.layer.inputs.to_json() if module.layer.inputs else None),
        }
        for name, module in packed_modules(model)
    ]


def _draw(console: "Console", found: dict[str, Any]) -> None:
    made = found.get("made_by") or {}
    paper = made.get("paper") or {}
    arguments = ", ".join(f"{k}={v!r}" for k, v in (made.get("arguments") or {}).items())
    link = f"https://arxiv.org/abs/{paper['arxiv']}" if paper.get("arxiv") else None
    used = made.get("calibration") or {}
    bits = found.get("bits_per_weight")
    pairs(
        console,
        [
            ("model", found["model"]),
            ("architecture", found["architecture"]),
            ("quantized by", found["quant_method"] or "nobody: full precision"),
            ("method", f"{made['method']}({arguments})" if made else None),
            ("paper", " ".join(str(x) for x in (paper.get("title"), link) if x) or None),
            (
                "calibration",
                ", ".join(f"{k} {v}" for k, v in used.items() if v is not None) or ("none" if made else None),
            ),
            ("seed", made.get("seed")),
            ("versions", ", ".join(f"{k} {v}" for k, v in (made.get("versions") or {}).items()) or None),
            ("size", f"{size(found['bytes'])} in {found['tensors']} tensors"),
            ("true bits per weight", None if bits is None else f"{bits:.3f}"),
        ],
    )
    if "layers" in found:
        keys = ("format", "weights", "inputs")
        alike = Counter(
            (*(x[k] for k in keys), "x".join(map(str, x["shape"])), f"{x['bits']:.3f}") for x in found["layers"]
        )
        console.print()
        rows = [(count, *key) for key, count in alike.items()]
        console.print(table(("layers", *keys, "shape", "bits"), rows, numbers=("layers", "bits")))
