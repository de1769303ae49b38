"""`hf-quant explain`: which kernel runs every layer and how, and why each other one does not."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.runtime.explain import Row

FUSED = {"low_rank": "the low-rank branch", "rotation": "the rotation", "entry_T": "ranges by timestep"}


def command(
    model: o.Model,
    device: Annotated[str | None, typer.Option("--device", help="Where it would run, such as cuda:0.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="What it would compute in; auto: as saved.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say which kernel every layer runs here, and why.

    For each other kernel it says why that one refused; below the table, what a kernel does at how many tokens.

    Layers with the same answer are one line. Kernels depend on the device, the type and the shape: ask with the
    ones you will run.

    [bold]Examples[/]

    \b
      hf-quant explain OUT
      hf-quant explain OUT --dtype bfloat16      [dim]the type decides on CPU[/]
      hf-quant explain OUT --json | jq -r '.[] | select(.kernel == "reference") | .name'
    """
    from hf_quant.loading import load_model, read_config, require_ours, torch_dtype
    from hf_quant.runtime.explain import explain

    require_ours(read_config(model), model)
    wanted = "auto" if dtype == "auto" else torch_dtype(dtype)
    rows = [_json(row) for row in explain(load_model(model, dtype=wanted, device=device))]
    show(rows, as_json, lambda console: _draw(console, rows))


def _json(row: "Row") -> dict[str, Any]:
    plain = {"device": str(row.device), "dtype": str(row.dtype).removeprefix("torch.")}
    return {
        "name": row.name,
        "format": row.format,
        "shape": row.shape,
        "kernel": row.kernel,
        "refused": row.refused,
        "fused": row.fused,
        "runs": row.runs,
    } | plain


def _draw(console: "Console", rows: list[dict[str, Any]]) -> None:
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["format"], f"{row['dtype']} {row['device']}", row["kernel"], _fused(row), _reasons(row)

    alike = Counter(map(key, rows))
    first = {key(row): row["name"] for row in reversed(rows)}
    cells = [(n, first[k], *k) for k, n in alike.items()]
    columns = ("layers", "first", "format", "runs in", "kernel", "takes on", "why not another")
    console.print(table(columns, cells, numbers=("layers",)))
    for runs, n in Counter((row["format"], row["shape"], row["runs"]) for row in rows if row["runs"]).items():
        console.print(f"\n[bold]{runs[0]} {runs[1][0]} x {runs[1][1]}[/], {n} layers", highlight=False)
        console.print(table(("tokens", "what runs"), _spans(runs[2])))


def _spans(runs: Sequence[tuple[int | None, str]]) -> list[tuple[str, str]]:
    firsts = [1, *(last + 1 for last, _ in runs if last is not None)]
    return [
        (f"{first} and more" if last is None else f"{first}" if last == first else f"{first} to {last}", what)
        for first, (last, what) in zip(firsts, runs, strict=True)
    ]


def _fused(row: dict[str, Any]) -> str:
    return ", ".join(FUSED.get(name, name) for name in row["fused"]) or "-"


def _reasons(row: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in row["refused"].items()) or "-"
