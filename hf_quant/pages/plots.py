"""Plots of a report, a value a layer, and of an error against the timestep. matplotlib without a screen."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.report import Entry, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#008300", "#e87ba4", "#eb6834")
MARKERS = "osD^vPX*"
INK, MUTED, LINE = "#1f2328", "#656d76", "#d8dee4"
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "hf_quant", "font.size": 10, "font.family": "sans-serif"}


def error_figure(report: Report) -> "Figure | None":
    """Relative squared error of every quantized layer, on a log scale; None when none was measured."""
    kinds = {e.error_of for e in report.quantized if e.error}
    label = "relative squared error of the " + " / ".join(sorted(k for k in kinds if k))
    return _figure(report, lambda e: e.error or None, label, draw=_log_lines)


def bits_figure(report: Report) -> "Figure | None":
    """True bits per weight of every quantized layer, scales and all else that is stored counted."""
    return _figure(report, lambda e: e.bits / e.values, "bits per weight", draw=_bars)


def seconds_figure(report: Report) -> "Figure | None":
    """Seconds spent on every quantized layer; None when not taken."""
    return _figure(report, lambda e: e.seconds, "seconds", draw=_lines_from_zero)


def timestep_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str = "SQNR of the network's answer, in dB"
) -> "Figure":
    """Name -> (timesteps, values), drawn from the first step of denoising on the left to the last."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.6))
        axes = figure.add_axes((0.075, 0.15, 0.695, 0.75))
        for i, (name, (timesteps, values)) in enumerate(series.items()):
            style = MARKERS[i // len(SERIES) % len(MARKERS)] + "-"
            color = SERIES[i % len(SERIES)]
            axes.plot(
                timesteps, values, style, color=color, label=name.replace("$", r"\$"), markersize=4, linewidth=1.6
            )
        axes.invert_xaxis()
        axes.set_xlabel("timestep, denoising from left to right", color=MUTED)
        _frame(axes, label)
    return figure


def svg(figure: "Figure", title: str) -> str:
    """The figure as an `<svg>` in the theme of its page, which defines `--ink --muted --line --series-0..7`."""
    import matplotlib

    out = StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for color, name in [
        (INK, "ink"),
        (MUTED, "muted"),
        (LINE, "line"),
        *((c, f"series-{i}") for i, c in enumerate(SERIES)),
    ]:
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)  # the page's own font
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{prefix}-", text)  # ids stay unique when a page holds several
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def save_png(figure: "Figure", path: str | Path) -> None:
    """The figure as a picture on white."""
    figure.savefig(path, format="png", dpi=120, facecolor="white")


def place(name: str) -> tuple[str, str]:
    """(block, kind) of a parameter: "model.layers.3.mlp.up_proj.weight" -> ("model.layers.3", "up_proj")."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    block = ".".join(parts[: numbers[0] + 1]) if numbers else ""
    kind = next((part for part in reversed(parts) if not part.isdigit()), name)
    return block, kind


Groups = dict[str, tuple[list[int], list[float]]]  # kind -> (block numbers, values)


def _figure(
    report: Report,
    value: Callable[[Entry], float | None],
    label: str,
    draw: "Callable[[Axes, Groups], None]",
) -> "Figure | None":
    points = [(*place(e.name), v) for e in report.quantized if (v := value(e)) is not None and math.isfinite(v)]
    if not points:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for block, _, _ in points))
    groups: Groups = {}
    for block, kind, v in points:
        x, y = groups.setdefault(kind.replace("$", r"\$"), ([], []))  # a $ would begin a formula
        x.append(blocks.index(block))
        y.append(v)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.6))  # fixed margins: a layout engine would take most of the time of a save
        axes = figure.add_axes((0.075, 0.15, 0.745, 0.75))
        draw(axes, groups)
        _dress(axes, label, blocks)
    return figure


def _lines(axes: "Axes", groups: Groups) -> None:
    for i, (kind, (x, y)) in enumerate(groups.items()):
        joined = "-" if len(set(x)) == len(x) else ""  # several layers of a kind in a block: points alone
        style = MARKERS[i // len(SERIES) % len(MARKERS)] + joined
        color = SERIES[i % len(SERIES)]
        axes.plot(x, y, style, color=color, label=kind, markersize=5, linewidth=1.6, clip_on=False)


def _lines_from_zero(axes: "Axes", groups: Groups) -> None:
    _lines(axes, groups)
    axes.set_ylim(bottom=0)


def _log_lines(axes: "Axes", groups: Groups) -> None:
    _lines(axes, groups)
    axes.set_yscale("log")


def _bars(axes: "Axes", groups: Groups) -> None:
    """Side by side, since equal values would hide each other as lines."""
    width = 0.8 / len(groups)
    for i, (kind, (x, y)) in enumerate(groups.items()):
        at = [b + (i - (len(groups) - 1) / 2) * width for b in x]
        axes.bar(at, y, width * 0.86, color=SERIES[i % len(SERIES)], label=kind)


def _dress(axes: "Axes", label: str, blocks: list[str]) -> None:
    step = max(1, -(-len(blocks) // 24))
    axes.set_xticks(range(0, len(blocks), step), [_short(b) for b in blocks[::step]])
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    stems = {b.rpartition(".")[0] for b in blocks}
    axes.set_xlabel("block" if len(stems) > 1 else f"block of {stems.pop() or 'the model'}", color=MUTED)
    _frame(axes, label)


def _frame(axes: "Axes", label: str) -> None:
    axes.set_title(label, loc="left", color=MUTED, fontsize=10)
    axes.tick_params(colors=MUTED, which="both", length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, labelcolor=INK, handlelength=1.4)


def _short(block: str) -> str:
    return block.rpartition(".")[2] or "outside"
