"""`hf-quant leaderboard`: methods and bits against each other on one model."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, show, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.measure.leaderboard import Contest
    from hf_quant.method import Method

COLUMNS = ("", "method", "asked", "true bits", "KL", "+-", "top-1 %", "seconds", "memory", "on disk")


def command(
    model: o.Model,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Held-out texts (.txt .jsonl .parquet) or ids (.npy).")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for rows, table and plot; finished rows are kept.")
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method to enter. Repeatable. Default: all for language models."),
    ] = None,
    bits: Annotated[str, typer.Option("--bits", "-b", help="Widths to enter, such as 4,3,2.")] = "4,3,2",
    group_size: o.GroupSize = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", metavar="FILE", help="What the methods calibrate on.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens in a window.")] = 256,
    tokens: Annotated[int, typer.Option("--tokens", help="How many to measure on at most.")] = 16384,
    seed: o.Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare methods on a model: quality against true bits, time, memory.

    Every row is quantized, saved, loaded back, and only then measured, so it says what a user of the file gets.
    Bits are true bits: scales, zero points and whatever else is stored are counted. A star marks the Pareto front:
    no other row is smaller and better at once. A method that cannot do a width says why below the table.

    OUT keeps each finished row; after Ctrl-C the same command goes on, and entering more methods later runs only
    those. It then holds [bold]leaderboard.json[/], [bold]leaderboard.md[/] and [bold]leaderboard.png[/].

    [bold]Examples[/]

    \b
      hf-quant leaderboard MODEL held-out.txt OUT -c texts.txt                [dim]all methods, 4 3 2 bits[/]
      hf-quant leaderboard MODEL ids.npy OUT -c calib.npy -m rtn -m gptq -b 3 -g 64
      hf-quant leaderboard MODEL ids.npy OUT -c calib.npy --json | jq .pareto
    """
    from hf_quant.measure import leaderboard as board

    widths = _widths(bits)
    contest = board.Contest(
        model=model,
        held_out=data,
        calibration=calibration,
        group_size=group_size,
        window=window,
        tokens=tokens,
        seed=seed,
    )
    chosen = _methods(methods)
    rows = board.run(contest, board.entries(chosen, widths), out)
    found = board.result(contest, rows, _line(contest, out, bits, methods or ()))
    (out / "leaderboard.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "leaderboard.md").write_text(_markdown(found))
    board.save_plot(rows, f"KL to full precision of {found['model']}, nats a token", out / "leaderboard.png")
    show(found, as_json, lambda console: _draw(console, found))


def _line(contest: "Contest", out: Path, bits: str, methods: Sequence[str]) -> str:
    """The command that gives these rows again; of files and folders only their names."""
    words = ["hf-quant", "leaderboard", Path(contest.model).name, contest.held_out.name, out.name, "--bits", bits]
    words += [] if contest.calibration is None else ["-c", contest.calibration.name]
    for field in fields(contest):
        value = getattr(contest, field.name)
        if field.name in ("group_size", "window", "tokens", "seed") and value != field.default:
            words += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(words + [w for name in methods for w in ("-m", name)])


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of widths such as 4,3,2", param_hint="--bits") from None


def _methods(names: list[str] | None) -> "list[Method]":
    from hf_quant.method import list_methods, method_named

    return [method_named(n) for n in names] if names else [m for m in list_methods() if "llm" in m.domains]


def _cells(found: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            "*" if _name(r) in found["pareto"] else "",
            r["method"],
            "-" if r["asked"] is None else str(r["asked"]),
            f"{r['bits']:.3f}",
            f"{r['kl']:.5f}",
            "-" if r["kl_error"] is None else f"{r['kl_error']:.5f}",
            f"{r['top1']:.2f}",
            f"{r['seconds']:.1f}",
            size(r["peak_bytes"]),
            size(r["bytes_on_disk"]),
        )
        for r in found["rows"]
    ]


def _name(row: dict[str, Any]) -> str:
    return str(row["method"]) if row["asked"] is None else f"{row['method']}-{row['asked']}"


def _draw(console: "Console", found: dict[str, Any]) -> None:
    console.print(table(COLUMNS, _cells(found), numbers=COLUMNS[2:]))
    for row in found["refused"]:
        console.print(f"[dim]{_name(row)}: {row['refused']}[/]", soft_wrap=True)


def _markdown(found: dict[str, Any]) -> str:
    lines = [
        f"# Leaderboard of {found['model']}",
        "",
        f"`{found['command']}`",
        "",
        f"On {found['settings']['tokens']:,} held-out tokens of {found['held_out']}, {found['device']}; every row was",
        "saved and loaded back before it was measured. A star: no other row is smaller and better at once.",
        "",
        "![KL against true bits](leaderboard.png)",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 2),
        *("| " + " | ".join(cells) + " |" for cells in _cells(found)),
    ]
    if found["refused"]:
        lines += ["", "Not run:", "", *(f"- {_name(r)}: {r['refused']}" for r in found["refused"])]
    return "\n".join(lines) + "\n"
