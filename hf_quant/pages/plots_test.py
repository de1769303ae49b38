import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from hf_quant.pages.plots import bits_figure, error_figure, place, save_png, seconds_figure, svg, timestep_figure
from hf_quant.report import Report


def plotted(figure):
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def test_the_errors_of_the_report_are_drawn_a_series_a_kind(report):
    figure = error_figure(report)
    assert plotted(figure) == {
        "q_proj": [0.002, 0.004, 0.006],
        "down_proj": [0.0001, 0.0002, 0.0003],
        "up_proj": [0.5],
    } | {"down_proj": pytest.approx([0.0001, 0.0002, 0.0003])}
    assert figure.axes[0].get_yscale() == "log"
    assert "output" in figure.axes[0].get_title(loc="left")


def test_the_bits_are_bars(report):
    heights = {round(bar.get_height(), 4) for bar in bits_figure(report).axes[0].patches}
    assert heights == {4.1875, 8.1875}


def test_nothing_measured_is_no_figure(report):
    bare = replace(report, coverage=tuple(replace(e, error=None, seconds=None) for e in report.coverage))
    assert error_figure(bare) is None
    assert seconds_figure(bare) is None
    assert bits_figure(bare) is not None
    assert bits_figure(Report(method={}, coverage=())) is None


def test_a_perfect_layer_does_not_break_the_log_scale(report):
    perfect = replace(report, coverage=(replace(report.coverage[0], error=0.0), *report.coverage[1:]))
    assert plotted(error_figure(perfect))["q_proj"] == [0.004, 0.006]


def test_svg_follows_the_page(report):
    text = svg(error_figure(report), "Error")
    root = ElementTree.fromstring(text)
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.get("aria-label") == "Error"
    assert "var(--series-0)" in text
    assert "#2a78d6" not in text
    assert "font-family" not in text
    assert ">q_proj<" in text


def test_svg_is_the_same_every_time(report):
    assert svg(error_figure(report), "Error") == svg(error_figure(report), "Error")


def test_ids_differ_between_charts(report):
    ids = [
        e.get("id")
        for t, f in (("Error", error_figure), ("Time", seconds_figure))
        for e in ElementTree.fromstring(svg(f(report), t)).iter()
        if e.get("id")
    ]
    assert len(ids) == len(set(ids))


def test_many_kinds_and_odd_names_are_drawn(report):
    odd = [replace(report.coverage[0], name=f"net.{i % 3}.<k{i}$>.weight") for i in range(20)]
    ElementTree.fromstring(svg(error_figure(replace(report, coverage=tuple(odd))), "Error"))


def test_png(report, tmp_path):
    save_png(error_figure(report), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers.3", "up_proj")),
        ("down_blocks.0.attentions.1.to_q.weight", ("down_blocks.0", "to_q")),
        ("model.layers.1.mlp.experts.0.weight", ("model.layers.1", "experts")),
        ("lm_head.weight", ("", "lm_head")),
    ],
)
def test_place(name, where):
    assert place(name) == where


def test_errors_by_timestep_run_from_noise_to_picture():
    figure = timestep_figure({"rtn": ([900.0, 100.0], [20.0, 10.0]), "$x": ([900.0, 100.0], [25.0, 12.0])})
    assert plotted(figure)["rtn"] == [20.0, 10.0]
    first, last = figure.axes[0].get_xlim()
    assert first > last
