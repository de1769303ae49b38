"""Values of a report in words, shared by the card and the page."""

import math
from collections.abc import Mapping
from typing import Any

from hf_quant.report import Report


def arguments(method: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own arguments out of `Report.method`."""
    return {k: v for k, v in method.items() if k not in ("quant_method", "version", "method", "seed") and v is not None}


def call(method: Mapping[str, Any]) -> str:
    """`QuantConfig("gptq", bits=4, group_size=128)`: how the run was asked for."""
    seed = {"seed": method["seed"]} if method.get("seed") else {}
    given = [f"{name}={value!r}" for name, value in (arguments(method) | seed).items()]
    return f"QuantConfig({', '.join([repr(method.get('method', '?')).replace(chr(39), chr(34)), *given])})"


def short_spec(spec: Mapping[str, Any] | None) -> str:
    """`Spec.to_json()` in a few words: "4-bit integers, asymmetric, groups of 128, bfloat16 scales"."""
    if not spec:
        return "full precision"
    rows, columns = spec["block"]
    if rows == -1:
        sharing = "per tensor" if columns == -1 else f"blocks of {columns} columns"
    elif columns == -1:
        one = "per token" if spec["index"] == "token" else "per output channel"
        sharing = one if rows == 1 else f"blocks of {rows} rows"
    else:
        sharing = f"groups of {columns}" if rows == 1 else f"blocks of {rows} x {columns}"
    zero = {"none": "symmetric", "int": "asymmetric", "float": "asymmetric (float zero point)"}[spec["zero"]]
    index = "" if spec["index"] in ("none", "token") else f", per {spec['index']}"
    when = ", computed at run time" if spec["range"] == "dynamic" else ""
    turned = f", rotated in blocks of {spec['rotation']['size']}" if spec.get("rotation") else ""
    tensor = " and one float32 scale in all" if spec.get("tensor_scale") else ""
    return f"{_grid(spec['grid'])}, {zero}, {sharing}{index}, {_grid(spec['scale'])} scales{tensor}{when}{turned}"


def _grid(grid: Mapping[str, Any]) -> str:
    match grid.get("type"):
        case "IntGrid":
            return f"{grid['bits']}-bit integers"
        case "FloatGrid":
            return str(grid["dtype"])
        case "LevelGrid":
            return f"{len(grid['levels'])} levels"
        case "MiniFloatGrid":
            return f"E{grid['exponent']}M{grid['mantissa']} floats"
        case "GaussianGrid":
            return f"{grid['size']} Gaussian points for {grid['vector']} values"
        case "CodebookGrid":
            return f"{grid['bits']}-bit codebooks"
        case other:
            return str(other).removesuffix("Grid").lower()


def count(value: float) -> str:
    """13898240 -> "13.9M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def megabytes(value: float) -> str:
    """Bytes with a decimal unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"


def seconds(value: float) -> str:
    """132.5 -> "2 min 12 s"."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(math.floor(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def groups(report: Report) -> list[tuple[str, str, str, int, float]]:
    """(kinds of layers, weights, inputs, how many, true bits a weight) for every way in which layers were quantized."""
    from hf_quant.pages.plots import place

    found: dict[tuple[str, str], list[Any]] = {}
    for entry in report.quantized:
        weights = short_spec(entry.spec) if entry.spec else f"format {entry.format}"
        found.setdefault((weights, short_spec(entry.inputs)), []).append(entry)
    return [
        (
            ", ".join(dict.fromkeys(place(e.name)[1] for e in entries)),
            weights,
            inputs,
            len(entries),
            sum(e.bits for e in entries) / sum(e.values for e in entries),
        )
        for (weights, inputs), entries in found.items()
    ]
