import re
from dataclasses import replace
from html.parser import HTMLParser

from hf_quant.pages.report_html import render, write
from hf_quant.report import Report

VOID = {"meta", "br", "link", "path", "use"}


class Page(HTMLParser):
    """Text, attributes and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def test_every_layer_and_every_figure_is_on_the_page(report, evaluation):
    page = Page(render(report, evaluation))
    for entry in report.coverage:
        assert entry.name in page.text
    for said in (
        'QuantConfig("rtn", bits=4, group_size=128, seed=7)',
        f"{report.bits_per_weight:.3f}",
        "0.003110 nats a token ± 0.000060",
        "95.96 % ± 0.21",
        "24.1570 ± 1.5000; full precision 24.1070",
        "0.002070 nats a token ± 0.000400",
        "small_test.npy: 64 windows of 512 tokens",
        evaluation.command,
        "2 min 12 s",
        "kept: output head (1)",
        "unsupported: no rule (1)",
        "never reached by calibration",
        "4-bit integers, asymmetric, groups of 128, bfloat16 scales",
        "ab" * 32,
        "2.13.0",
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 3
    assert "not measured" not in page.text


def test_what_was_not_measured_says_so(report):
    bare = replace(report, coverage=tuple(replace(e, error=None, seconds=None) for e in report.coverage))
    text = Page(render(bare)).text
    assert "KL to full precision not measured" in text.replace("precisionnot", "precision not")
    assert "No layer's error was measured." in text
    assert not re.search(r"nats|± \d", text)


def test_the_evaluation_inside_the_report_is_shown(report, evaluation):
    assert render(replace(report, measured=evaluation.to_json())) == render(
        replace(report, measured=evaluation.to_json()), evaluation
    )


def test_nothing_is_loaded_from_elsewhere(report, evaluation):
    text = render(report, evaluation)
    page = Page(text)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), (name, value)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique(report):
    ids = [value for name, value in Page(render(report)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_light_and_dark_name_the_same_colors(report):
    text = render(report)
    light, dark = re.search(
        r":root \{(.*?)\n\}\n@media \(prefers-color-scheme: dark\) \{ :root \{(.*?)\} \}", text, re.DOTALL
    ).groups()
    names = [set(re.findall(r"(--[\w-]+):", part)) for part in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= names[0]


def test_names_cannot_inject(report):
    evil = "<script>alert(1)</script>"
    hostile = replace(
        report,
        coverage=(replace(report.coverage[0], name=f"model.layers.0.{evil}.weight", reason=evil),),
        method={"method": evil},
        calibration={"source": evil},
    )
    assert "<script" not in render(hostile)


def test_an_empty_report_is_a_page(tmp_path):
    write(Report(method={}, coverage=()), tmp_path / "report.html")
    assert "No layer was quantized." in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
