"""The tables of a README, written from the JSON in `results/`: `python kernels/bench/tables.py kernels/README.md`.

They stand between `<!-- figures -->` and `<!-- /figures -->`. Without any JSON they say that nothing was measured.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


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
    absent = result["linear"]["absent"]
    if absent:
        parts.append("Not there: " + "; ".join(f"{n} ({why})" for n, why in absent.items()) + ".")
    return parts


def _speedup(times: Mapping[str, float], name: str) -> str:
    return f"{times['torch'] / times[name]:.2f}" if name in times and "torch" in times else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def written(text: str, results: Iterable[Mapping[str, Any]]) -> str:
    """The text with the figures in their place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{figures(results)}\n{END}{rest.split(END)[1]}"


def all_results() -> list[dict[str, Any]]:
    """What was measured, by device."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(written(file.read_text(), all_results()))
