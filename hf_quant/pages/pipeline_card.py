"""The card of a pipeline: what each component became, and pictures of before and after from equal noise."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_quant.measure.picture_metrics import psnr
from hf_quant.pages.describe import call, groups, megabytes, seconds
from hf_quant.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_quant.diffusion.pipelines import Pictures

GRID = "pictures.png"
COLUMNS = 8


def card(
    kind: str,
    reports: Mapping[str, Report],
    pictures: "Pictures | None",
    repo: str,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """The text of README.md.

    Args:
        kind: name of the pipeline's class.
        reports: component -> what was done to it.
        pictures: drawn before and after; they lie in `GRID` beside the card.
        repo: where the pipeline can be loaded from.
        base_model: Hub id of the full-precision pipeline.
        dtype: what it computes in, which loading has to name: parts of it would follow their files, others not.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"megabytes": megabytes, "seconds": seconds, "call": call, "groups": groups}
    template = (files("hf_quant.pages") / "pipeline_card.md.jinja").read_text(encoding="utf-8")
    methods = list(dict.fromkeys(str(r.method.get("method", "unknown")) for r in reports.values()))
    text = environment.from_string(template).render(
        kind=kind,
        reports=reports,
        repo=repo,
        dtype=None if dtype == torch.float32 else str(dtype),
        base_model=base_model,
        grid=GRID,
        pictures=pictures,
        psnr=None if pictures is None else float(psnr(pictures.quantized, pictures.full).mean()),
        papers=_papers(methods),
        versions=next(iter(reports.values())).versions,
    )
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="diffusers",
        tags=["hf_quant", "quantized", *methods],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _papers(methods: list[str]) -> list[tuple[str, str, str | None]]:
    from hf_quant.errors import ConfigError
    from hf_quant.method import method_named

    found = []
    for name in methods:
        try:
            paper = method_named(name).paper
        except ConfigError:  # a method of a plug-in that is not installed here
            continue
        found.append((name, paper.title, paper.url))
    return found


def grid(pictures: "Pictures") -> "Figure":
    """Two rows: full precision above what was quantized."""
    from matplotlib.figure import Figure

    shown = min(COLUMNS, len(pictures.full))
    figure = Figure(figsize=(1.4 * shown + 0.4, 3.1))
    axes = figure.subplots(2, shown, squeeze=False)
    for row, drawn in zip(axes, (pictures.full, pictures.quantized), strict=True):
        for place, picture in zip(row, drawn, strict=False):
            place.imshow(picture.squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
    axes[0][0].set_ylabel("full precision")
    axes[1][0].set_ylabel("quantized")
    figure.tight_layout(pad=0.4)
    return figure


def renamed(text: str, repo: str) -> str:
    """A card of a pipeline that can be loaded from another place now."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    old = found[1] if found else repo
    return text.replace(f"\n# {old}\n", f"\n# {repo}\n", 1).replace(
        f'from_pretrained("{old}"', f'from_pretrained("{repo}"'
    )


def write(
    folder: Path,
    kind: str,
    reports: Mapping[str, Report],
    pictures: Any,  # noqa: ANN401  Pictures, or None
    repo: str,
    base: str | None,
    dtype: torch.dtype,
) -> None:
    """README.md, the pictures, and a report for each component."""
    from hf_quant.pages.plots import save_png

    if pictures is not None:
        save_png(grid(pictures), folder / GRID)
    for name, report in reports.items():
        report.save(folder / f"report-{name}.json")
    (folder / "README.md").write_text(card(kind, reports, pictures, repo, base, dtype), encoding="utf-8")
