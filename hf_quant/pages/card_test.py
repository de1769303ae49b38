import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_quant.pages.card import About, about_model, card, save_card
from hf_quant.report import Report

ABOUT = About(
    repo="me/small-lm-rtn-4bit",
    base_model="org/small-lm",
    pipeline_tag="text-generation",
    license="apache-2.0",
    kernels={"int4pack": 6, "reference": 1},
    device="cpu",
    weights_bytes=9_000_000,
)


def test_metadata_is_what_the_hub_reads(report, evaluation):
    data = ModelCard(card(report, evaluation, ABOUT)).data.to_dict()
    assert data == {
        "base_model": "org/small-lm",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hf_quant", "quantized", "rtn", "4-bit"],
    }


def test_what_is_not_known_is_not_in_the_metadata(report):
    assert ModelCard(card(report)).data.to_dict().keys() == {"library_name", "tags"}


def test_says_what_was_done_and_measured(report, evaluation):
    text = card(report, evaluation, ABOUT)
    for said in (
        "# me/small-lm-rtn-4bit, ",
        f"{report.bits_per_weight:.3f} bits per weight",
        'from_pretrained("me/small-lm-rtn-4bit")',
        "pip install hf-quant",
        '`QuantConfig("rtn", bits=4, group_size=128, seed=7)`',
        "| seed | 7 |",
        "docs.txt: 128 samples, 65536 tokens",
        "| q_proj | 4-bit integers, asymmetric, groups of 128, bfloat16 scales | full precision | 3 | 4.188 |",
        "the weight files are 9 MB",
        "- 1 x output head",
        "0.00311 ± 0.00006",
        "95.96 ± 0.21",
        "| 24.107 | 24.157 ± 1.500 |",
        "| increase of the loss, nats a token | 0 | 0.00207 ± 0.00040 |",
        evaluation.command,
        "- 6 layers: `int4pack`",
        "- 1 layer: `reference`",
        "`model.layers.2.mlp.up_proj.weight`: never reached by calibration",
        "`odd.weight` could not be quantized and is kept: no rule",
        "torch 2.13.0",
    ):
        assert said in text, said


def test_links_the_paper():
    from hf_quant.method import list_methods

    published = [m for m in list_methods() if m.paper.arxiv]
    assert published
    for method in published:
        text = card(Report(method={"method": method.id}, coverage=()))
        assert f"(https://arxiv.org/abs/{method.paper.arxiv})" in text


def test_a_method_that_is_not_installed_still_gets_a_card(report):
    assert "`from-elsewhere`" in card(replace(report, method={"method": "from-elsewhere"}))


def numbers(text):
    return set(re.findall(r"\d+\.\d+", text))


def test_nothing_unmeasured_is_stated(report):
    """Without an evaluation the card holds no number that the report does not hold."""
    text = card(report)
    assert "KL to full precision: not measured" in text
    assert "No quality figure was measured" in text
    assert "±" not in text
    own = card(replace(report, seconds=0.0, peak_bytes=0, coverage=(), versions={}))
    assert numbers(own) == {"0.000"}  # the bits per weight of nothing
    assert "peak memory | not measured" in own


def test_each_unmeasured_figure_says_so(report, evaluation):
    bare = replace(
        evaluation,
        kl=None,
        kl_error=None,
        top1=None,
        top1_error=None,
        reference_perplexity=None,
        loss_increase=None,
        loss_increase_error=None,
    )
    text = card(report, bare)
    assert "nats a token | 0 | not measured |" in text
    assert "token, % | 100 | not measured |" in text
    assert "| perplexity | not measured | 24.157 ± 1.500 |" in text


def test_the_evaluation_inside_the_report_is_used(report, evaluation):
    assert card(replace(report, measured=evaluation.to_json())) == card(report, evaluation)


def test_text_cannot_break_a_table(report):
    odd = replace(report, calibration={"source": "a|b\n`c`", "samples": 1, "tokens": 2})
    assert "| calibration data | a\\|b 'c': 1 samples, 2 tokens |" in card(odd)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


class TestAboutModel:
    def test_a_base_on_the_hub(self, model):
        model.config._name_or_path = "org/base-7B"
        about = about_model(model)
        assert about.base_model == "org/base-7B"
        assert about.pipeline_tag == "text-generation"
        assert about.library == "transformers"
        assert about.loader == "AutoModelForCausalLM"
        assert about.kernels is None
        assert about.license is None

    def test_a_base_in_a_folder_is_no_hub_id_but_its_card_names_the_license(self, model, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
        model.config._name_or_path = str(tmp_path)
        about = about_model(model)
        assert about.base_model is None
        assert about.license == "mit"
        assert str(tmp_path) not in card(Report(method={}, coverage=()), about=about)

    def test_a_license_without_a_hub_name_keeps_its_own(self, model, tiny_lm_path):
        model.config._name_or_path = str(tiny_lm_path)
        about = about_model(model)
        assert (about.license, about.license_name, about.license_link) == ("other", "psf-2.0", None)
        data = ModelCard(card(Report(method={}, coverage=()), about=about)).data.to_dict()
        assert data["license_name"] == "psf-2.0"

    def test_a_quantized_model_saved_again_keeps_its_base(self, model, report, tmp_path):
        model.config._name_or_path = "org/base-7B"
        save_card(model, tmp_path, report)
        model.config._name_or_path, model.hf_quantizer = str(tmp_path), SimpleNamespace(pre_quantized=True)
        assert about_model(model).base_model == "org/base-7B"
        model.config._name_or_path = "me/base-7B-4bit"
        assert about_model(model).base_model is None

    @pytest.mark.parametrize("name", ["", "/a/b/c", "../x", "C:\\models\\x"])
    def test_no_path_is_taken_for_a_hub_id(self, model, name):
        model.config._name_or_path = name
        assert about_model(model).base_model is None

    def test_a_broken_card_of_the_base_names_no_license(self, model, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
        model.config._name_or_path = str(tmp_path)
        assert about_model(model).license is None

    def test_kernels_are_those_the_layers_run(self, model):
        for layer, kernel in zip(model.model.layers[0].mlp.children(), ("a", "a", "b"), strict=False):
            layer.kernel = kernel
        about = about_model(model)
        assert about.kernels == {"a": 2, "b": 1}
        assert about.device == "cpu"


def test_save_writes_the_card_the_report_and_the_page(model, report, evaluation, tmp_path):
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    save_card(model, folder, report, evaluation)
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("out")' in text
    assert "![" in text
    assert (folder / "layers.png").stat().st_size > 1000
    assert Report.load(folder / "report.json") == replace(report, measured=evaluation.to_json())
    assert "0.003110" in (folder / "report.html").read_text()
    size = (folder / "model.safetensors").stat().st_size
    assert f"the weight files are {size / 1e3:.3g} kB" in text
