"""report.html: one self-contained page on a run, light and dark: quality, charts by layer, coverage, provenance."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_quant.measure.evaluation import Evaluation, measured_of
from hf_quant.pages import plots
from hf_quant.pages.describe import call, count, groups, megabytes, seconds
from hf_quant.report import Entry, Report


def write(report: Report, path: str | Path, evaluation: Evaluation | None = None) -> None:
    """Write the page to `path`."""
    Path(path).write_text(render(report, evaluation), encoding="utf-8")


def render(report: Report, evaluation: Evaluation | None = None) -> str:
    """The page. Its numbers are those of the report and of the evaluation (default: the report's own), no others."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": count, "megabytes": megabytes, "seconds": seconds}
    template = environment.from_string((files("hf_quant.pages") / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        measured=evaluation or measured_of(report),
        call=call(report.method),
        series=list(enumerate(plots.SERIES)),
        charts=_charts(report),
        shares=_shares(report),
        kept=_kept(report),
        groups=groups(report),
        worst=max((e.error for e in report.quantized if e.error), default=None),
    )


def _charts(report: Report) -> list[tuple[str, str | None, str]]:
    """(title, svg or None, what to say when there is none)."""
    figures = (
        ("Error", plots.error_figure(report), "No layer's error was measured."),
        ("Bits", plots.bits_figure(report), "No layer was quantized."),
        ("Time", plots.seconds_figure(report), "Seconds a layer were not taken."),
    )
    return [(title, plots.svg(figure, title) if figure else None, otherwise) for title, figure, otherwise in figures]


def _shares(report: Report) -> list[dict[str, Any]]:
    """How many of the parameters listed are quantized, kept and unsupported, and their share of what is stored."""
    values, bits = (sum(getattr(e, n) for e in report.coverage) for n in ("values", "bits"))
    shares = []
    for status in ("quantized", "kept", "unsupported"):
        part = [e for e in report.coverage if e.status == status]
        shares.append(
            {
                "status": status,
                "entries": len(part),
                "values": sum(e.values for e in part),
                "of_values": 100 * sum(e.values for e in part) / values if values else 0.0,
                "bytes": sum(e.bits for e in part) / 8,
                "of_bytes": 100 * sum(e.bits for e in part) / bits if bits else 0.0,
            }
        )
    return shares


def _kept(report: Report) -> dict[str, list[Entry]]:
    """Entries that are not quantized, by reason."""
    reasons: dict[str, list[Entry]] = {}
    for entry in report.coverage:
        if entry.status != "quantized":
            reasons.setdefault(f"{entry.status}: {entry.reason or 'no reason given'}", []).append(entry)
    return reasons
