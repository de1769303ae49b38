"""What commands print: a table or a few lines for people, one JSON document for machines."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for machines.")]


def show(data: Any, as_json: bool, draw: Callable[[Console], None]) -> None:  # noqa: ANN401  anything JSON holds
    """Print `data` as JSON, or let `draw` print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        # a pipe has no width: nothing is cut there
        draw(Console(highlight=False, width=None if sys.stdout.isatty() else 160))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()) -> Table:
    """A table; the columns named in `numbers` are aligned right."""
    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    return drawn


def pairs(console: Console, rows: Sequence[tuple[str, object]]) -> None:
    """Aligned `name  value` lines; rows whose value is None are left out."""
    there = [(name, value) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in there), default=0)
    for name, value in there:
        console.print(f"[bold]{name:<{width}}[/]  {escape(str(value))}", soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people: "10.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
