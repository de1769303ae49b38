"""`hf-quant card`: write the model card again, with what was measured since."""

import json
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli.output import Json, pairs, show

if TYPE_CHECKING:
    from rich.console import Console


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model that hf-quant quantized.")],
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", "-e", metavar="FILE", help="What `hf-quant evaluate --json` printed."),
    ] = None,
    repo: Annotated[str | None, typer.Option("--repo", help="Hub id it will be loaded from, for the card.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that a person wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card (README.md) of a quantized model again.

    `quantize` and `save_pretrained` write one anyway. This one adds what was measured later. Its numbers come from
    report.json and the evaluation alone; what was not measured is said not to be.

    [bold]Examples[/]

    \b
      hf-quant evaluate OUT held-out.txt --reference MODEL --json > quality.json
      hf-quant card OUT --evaluation quality.json
      hf-quant card OUT --repo user/name          [dim]before it is uploaded there[/]
    """
    from hf_quant.errors import CheckpointError, RunError
    from hf_quant.integrations.saving import by_a_person
    from hf_quant.loading import load_model, read_config, require_ours, resolve
    from hf_quant.pages.card import save_card
    from hf_quant.report import Report

    require_ours(read_config(model), model)
    folder, readme = Path(resolve(model)), Path(resolve(model)) / "README.md"
    if not force and by_a_person(readme):
        raise RunError(f"{readme} was written by a person; --force replaces it")
    report = Report.load(folder / "report.json")
    if evaluation is not None:
        found = read_evaluation(evaluation)
        if not isclose(found["bits_per_weight"] or 0, report.bits_per_weight, rel_tol=1e-6):
            raise CheckpointError(f"{evaluation} measured another model: its bits per weight are not those of {folder}")
        report = replace(report, measured=found)
    try:
        save_card(load_model(folder), folder, report, repo=repo)
    except OSError as error:
        raise RunError(f"cannot write {readme}: {error.strerror}") from None
    files = [str(folder / name) for name in ("README.md", "report.json", "report.html")]
    summary = {"files": files, "measured": bool(report.measured)}
    show(summary, as_json, lambda console: _draw(console, summary))


def read_evaluation(file: Path) -> dict[str, Any]:
    """What `hf-quant evaluate --json` printed into a file.

    Raises:
        CheckpointError: the file is missing, or no evaluation.
    """
    from hf_quant.errors import CheckpointError
    from hf_quant.measure.evaluation import Evaluation

    try:
        return Evaluation.from_json(json.loads(file.read_text())).to_json()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is no evaluation as `hf-quant evaluate --json` prints it: {error}") from None


def _draw(console: "Console", summary: dict[str, Any]) -> None:
    pairs(console, [("wrote", name) for name in summary["files"]])
    if not summary["measured"]:
        console.print("No quality figure was measured; `hf-quant evaluate --help` says how.")
