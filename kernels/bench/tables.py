"""The figures of the READMEs, written from JSON: `python kernels/bench/tables.py README.md kernels/README.md`.

They stand between marks: `<!-- figures -->` and `<!-- /figures -->` for GPUs (`results/`), `gpu` for a paragraph on
GPUs, `cpu`, `cpu-amx` and `cpu-avx2` for products on CPU (`cpu.json` and so on), `memory` for resident memory
(`cpu_memory.json` of examples/benchmarks). Without any JSON of a GPU they say that nothing was measured.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CPU = {name: HERE / f"{name}.json" for name in ("cpu", "cpu-amx", "cpu-avx2")}
MEMORY = HERE.parents[1] / "examples" / "benchmarks" / "results" / "cpu_memory.json"


def figures(results: Iterable[Mapping[str, Any]]) -> str:
    """Every machine's tables, in Markdown."""
    parts = [part for result in results for part in _machine(result)]
    return "\n\n".join(parts) if parts else "On GPUs: not measured."


def _machine(result: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in result["machine"].items() if k != "device")
    parts = [f"**{result['machine']['device']}** ({versions}), `make bench-gpu`."]
    speeds = result["decoding"]["tokens_per_second"]
    if speeds:
        names = list(dict.fromkeys(n for row in speeds.values() for n in row))
        lines = [[m, *(_number(row.get(n)) for n in names)] for m, row in speeds.items()]
        parts.append("Tokens a second, one sequence:\n\n" + _table(["Llama-shaped", *names], lines))
    shapes = dict.fromkeys(tuple(row["shape"]) for row in result["linear"]["rows"])
    for shape in shapes:
        rows = [r for r in result["linear"]["rows"] if tuple(r["shape"]) == shape]
        names = [n for n in dict.fromkeys(n for r in rows for n in r["microseconds"]) if n != "torch"]
        table = [[n, *(_speedup(r["microseconds"], n) for r in rows)] for n in names]
        table.append(["torch, microseconds", *(_number(r["microseconds"].get("torch")) for r in rows)])
        title = f"{shape[0]} x {shape[1]}, times torch's {result['linear']['dtype']} product; columns are tokens:\n\n"
        parts.append(title + _table(["", *(str(r["tokens"]) for r in rows)], table))
    operations = result["operations"]
    names = list(dict.fromkeys(r["operation"] for r in operations["rows"]))
    counts = list(dict.fromkeys(r["tokens"] for r in operations["rows"]))
    found = {(r["operation"], r["tokens"]): list(r["microseconds"].items()) for r in operations["rows"]}
    table = [[n, _ways(found.get((n, counts[0]))), *(_gain(found.get((n, c))) for c in counts)] for n in names]
    title = f"Times the other way, {operations['shape'][0]} x {operations['shape'][1]}; columns are tokens:\n\n"
    parts.append(title + _table(["", "", *map(str, counts)], table))
    parts += result.get("notes", [])
    absent = result["linear"]["absent"] | operations["absent"]
    if absent:
        parts.append("Not there: " + "; ".join(f"{n} ({why})" for n, why in absent.items()) + ".")
    return parts


def _speedup(times: Mapping[str, float], name: str) -> str:
    return f"{times['torch'] / times[name]:.2f}" if name in times and "torch" in times else ""


def _ways(times: list[tuple[str, float]] | None) -> str:
    return " over ".join(way for way, _ in reversed(times or []))


def _gain(times: list[tuple[str, float]] | None) -> str:
    return f"{times[-1][1] / times[0][1]:.2f}" if times and len(times) == 2 else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cpu_figures(result: Mapping[str, Any]) -> str:
    """Layers as they run, beside torch's bfloat16 and beside the reference."""
    times, dense = result["milliseconds"], result["milliseconds"]["bf16 linear"]
    layers = dict.fromkeys(name.split(": ")[0] for name in times if ": " in name)
    reference = {n: times[f"{n}: dequantize and multiply"] for n in layers}
    runs = {n: times.get(f"{n}: as it runs", reference[n]) for n in layers}
    shape, versions = " x ".join(map(str, result["shape"])), ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    parts = [f"{shape}; {versions}."]
    bases = {"Times torch's bf16 product": dict.fromkeys(layers, dense)}
    if "f32 linear" in times:
        bases["Times torch's float32 product"] = dict.fromkeys(layers, times["f32 linear"])
    for title, base in (bases | {"Times dequantizing and multiplying": reference}).items():
        rows = [[n, *(f"{base[n][t] / runs[n][t]:.2f}" for t in dense)] for n in layers]
        parts.append(f"{title}; columns are tokens:\n\n" + _table(["", *dense], rows))
    peers = result.get("peers", {})
    rows = [_beside(n, bits, peers, times, runs[n]) for n, bits in result.get("layers", {}).items()]
    if any(rows):
        title = "Times the fastest other with as many bits of weights and of tokens; columns are tokens"
        parts.append(f"{title}:\n\n" + _table(["", *dense], [row for row in rows if row]))
    for kind, bits in (("bf16", 16), ("8-bit", 8), ("4-bit", 4)):
        rows = [
            [n, str(peer["inputs"]), *(f"{dense[t] / ms:.2f}" for t, ms in times[n].items())]
            for n, peer in peers.items()
            if peer["weights"] == bits
        ]
        if rows:
            title = (
                f"Others with {kind} weights, times torch's bf16 product, and the bits that a token's values keep in it"
            )
            parts.append(f"{title}:\n\n" + _table(["", "bits", *dense], rows))
    if result.get("absent"):
        parts.append("Not there: " + "; ".join(f"{n} ({why})" for n, why in result["absent"].items()) + ".")
    parts.append("torch's bf16 product, milliseconds: " + ", ".join(f"{v:g}" for v in dense.values()) + ".")
    return "\n\n".join(parts)


def _beside(
    name: str,
    bits: Mapping[str, int],
    peers: Mapping[str, Mapping[str, int]],
    times: Mapping[str, Mapping[str, float]],
    ours: Mapping[str, float],
) -> list[str]:
    """A row of ratios, each with who it is to; nothing where nobody has these bits."""
    equals = [peer for peer, own in peers.items() if own == bits]
    best = {t: min(equals, key=lambda peer: times[peer][t]) for t in ours} if equals else {}
    return [name, *(f"{times[peer][t] / ours[t]:.2f} ({peer})" for t, peer in best.items())] if best else []


def memory_figures(result: Mapping[str, Any]) -> str:
    """One sentence: resident memory after a forward, as a share of bfloat16's."""
    sizes = result["bytes"]
    whole = sizes["bf16"]["after_a_forward"]
    shares = " and ".join(
        f"{row['after_a_forward'] / whole:.2f} ({name})" for name, row in sizes.items() if name != "bf16"
    )
    return (
        f"On CPU a model that has run keeps its codes once: resident memory is {shares} of bfloat16's\n"
        f"{whole / 1e6:.0f} MB for a Llama-shaped model with random weights (torch {result['machine']['torch']}, "
        "`examples/benchmarks/cpu_memory.py`)."
    )


def gpu_figures(results: Iterable[Mapping[str, Any]]) -> str:
    """One paragraph a machine: a 4-bit layer beside torch's and beside other libraries'; whole decoders."""
    ours = "int-group W4 g128"
    parts = []
    for result in results:
        rows = {r["tokens"]: r["microseconds"] for r in result["linear"]["rows"] if r["shape"] == [8192, 8192]}
        speeds = result["decoding"]["tokens_per_second"]
        others = [n for n in rows[1] if n.startswith(("Marlin", "gemlite", "tinygemm"))]
        beside = "; ".join(
            f"{n.split()[0]} " + " and ".join(f"{rows[t][n] / rows[t][ours]:.2f}" for t in (1, 16)) for n in others
        )
        decoders = " and ".join(f"{row[ours] / row['torch']:.2f} times ({name})" for name, row in speeds.items())
        parts.append(
            f"On an {result['machine']['device']}, a 4-bit layer (g128, 8192 x 8192) is "
            f"{rows[1]['torch'] / rows[1][ours]:.2f} times as fast as torch's bfloat16 for 1 token and "
            f"{rows[16]['torch'] / rows[16][ours]:.2f} times for 16.\nTimes of other 4-bit kernels over ours, "
            f"for 1 and for 16: {beside}.\nLlama-shaped decoders in CUDA graphs run {decoders} as fast as in bfloat16 "
            f"([kernels](kernels/README.md#figures) has the tables)."
        )
    return "\n\n".join(parts)


def put(text: str, name: str, content: str) -> str:
    """The text with the content between the marks of this name, where it has them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        return text
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def written(text: str) -> str:
    """The text with all that was measured in its places."""
    text = put(text, "figures", figures(all_results()))
    text = put(text, "gpu", gpu_figures(all_results()))
    for name, path in CPU.items():
        text = put(text, name, cpu_figures(json.loads(path.read_text())))
    return put(text, "memory", memory_figures(json.loads(MEMORY.read_text())))


def all_results() -> list[dict[str, Any]]:
    """What was measured, by device."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(written(file.read_text()))
