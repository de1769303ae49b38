"""`hf-quant methods`: the registry as a table."""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli.output import Json, pairs, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.method import Method
    from hf_quant.spec import Spec

VALUES = ("weights", "inputs", "cache", "format")  # the fields of a recipe that are no stages


def command(
    method: Annotated[str | None, typer.Argument(help="One method: its arguments, paper and claim.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods: id, paper, domains, stages, bits.

    Bits are those of the defaults: [bold]W4A16 g128[/] is 4-bit weights in groups of 128 with 16-bit activations.
    Any bits a method can do are chosen with --bits.

    [bold]Examples[/]

    \b
      hf-quant methods                 [dim]all of them[/]
      hf-quant methods gptq            [dim]what gptq takes, where it was published, what its test shows[/]
      hf-quant methods --json | jq -r '.[].id'
    """
    from hf_quant.method import list_methods, method_named

    if method is not None:
        one = describe(method_named(method))
        show(one, as_json, lambda console: _draw_one(console, one))
        return
    rows = [describe(m) for m in list_methods()]
    columns = ("id", "paper", "domains", "stages", "bits")
    cells = [(r["id"], r["arxiv"] or "-", " ".join(r["domains"]), " ".join(r["stages"]), r["bits"]) for r in rows]
    show(rows, as_json, lambda console: console.print(table(columns, cells)))


def _draw_one(console: "Console", one: dict[str, Any]) -> None:
    arguments = ", ".join(f"{k}={v!r}" for k, v in one["arguments"].items())
    pairs(
        console,
        [
            ("id", one["id"]),
            ("paper", one["title"]),
            ("link", one["url"]),
            ("domains", " ".join(one["domains"])),
            ("stages", " ".join(one["stages"]) or "plain defaults"),
            ("bits", one["bits"]),
            ("arguments", arguments or "none"),
            ("claim", one["claim"]),
        ],
    )


def describe(method: "Method") -> dict[str, Any]:
    """A method as JSON: what `hf-quant methods --json` prints of it."""
    from hf_quant.recipe import Recipe

    arguments = {n: p.default for n, p in method.signature.parameters.items()}
    built = method.build()
    return {
        "id": method.id,
        "arxiv": method.paper.arxiv,
        "title": method.paper.title,
        "url": method.paper.url,
        "domains": sorted(method.domains),
        "stages": _stages(built) if isinstance(built, Recipe) else [type(built).__name__],
        "bits": _width(built.weights, built.inputs) if isinstance(built, Recipe) else "own",
        "arguments": arguments,
        "claim": method.claim,
    }


def _stages(recipe: Any) -> list[str]:  # noqa: ANN401
    """Class names of the stages that are not the plain default."""
    named: list[str] = []
    for stage in fields(recipe):
        value = getattr(recipe, stage.name)
        if stage.name not in VALUES and value != stage.default:
            named += [type(v).__name__ for v in (value if isinstance(value, tuple) else (value,))]
    return named


def _width(weights: "Spec", inputs: "Spec | None") -> str:
    group = {-1: ""}.get(weights.block[1], f" g{weights.block[1]}")
    return f"W{weights.grid.bits:g}A{16 if inputs is None else inputs.grid.bits:g}{group}"
