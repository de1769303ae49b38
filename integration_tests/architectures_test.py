"""Every architecture the library promises: found, quantized, saved, loaded back by stock calls to the same bits."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, UnsupportedModel
from hf_quant.ledger import true_bits
from hf_quant.qtensor import nearest
from hf_quant.report import Report
from hf_quant.runtime.apart import take_apart
from hf_quant.runtime.embedding import QuantEmbedding
from hf_quant.runtime.packed import Packed
from integration_tests.architectures import MODELS, build, inputs, logits, same

PROMISED = sorted(MODELS.keys() - {"llama4"})
Save = Callable[[str], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Name -> folder of the saved float model, made once."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(folders[name])
        return folders[name]

    return save


def rtn(**options: Any) -> QuantConfig:
    return QuantConfig("rtn", bits=4, group_size=32, **options)


def gptq(name: str, **options: Any) -> QuantConfig:
    batches = [inputs(name, rows=4, seed=s) for s in (5, 6)]
    return QuantConfig("gptq", bits=4, group_size=32, calibration=batches, **options)


def load(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """`from_pretrained`, which must find every tensor it needs and no other."""
    model, found = MODELS[name][0].from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def report_of(model: PreTrainedModel) -> Report:
    report = model.hf_quant_report
    assert isinstance(report, Report)
    return report


def check_round_trip(folder: Path, name: str, config: Callable[[], QuantConfig], out: Path) -> PreTrainedModel:
    """Quantized on the way in and in memory alike; saved, loaded, saved, loaded: the same model all along."""
    model = load(folder, name, quantization_config=config())
    want = logits(model, name)
    in_memory = load(folder, name)
    report = hf_quant.quantize(in_memory, config(), progress=False)
    assert same(in_memory, model)
    assert {e.name: e.status for e in report.coverage} == {e.name: e.status for e in report_of(model).coverage}
    model.save_pretrained(out / "once")
    once = load(out / "once", name)
    assert same(once, model)
    assert torch.equal(logits(once, name), want)
    once.save_pretrained(out / "twice")
    twice = load(out / "twice", name)
    assert same(twice, model)
    assert torch.equal(logits(twice, name), want)
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", PROMISED)
def test_round_trip(name: str, method: str, saved: Save, tmp_path: Path) -> None:
    config = {"rtn": rtn, "gptq": lambda: gptq(name, allow=["*.experts.*"])}[method]
    model = check_round_trip(saved(name), name, config, tmp_path)
    assert 4 < true_bits(model) < 6
    plain = build(name)
    assert not torch.equal(logits(model, name), logits(plain, name))
    torch.testing.assert_close(logits(hf_quant.dequantize(model), name), logits(load(tmp_path / "once", name), name))


@pytest.mark.parametrize("name", PROMISED)
def test_coverage_lists_every_large_parameter(name: str, saved: Save) -> None:
    """Under the names of the float model; the experts of a fused parameter one by one."""
    report = report_of(load(saved(name), name, quantization_config=rtn()))
    listed = {e.name: e for e in report.coverage}
    plain = build(name)
    tied = plain.all_tied_weights_keys
    for parameter, value in plain.named_parameters():
        if value.numel() <= 1024 or parameter in tied:
            continue
        experts = [e for e in listed if ".experts." in parameter and e.startswith(parameter.rpartition(".")[0])]
        if parameter.endswith("experts.gate_up_proj_bias"):
            continue  # a vector an expert, none of them large
        assert parameter in listed or len(experts) == 8, parameter
    assert all(e.status in ("quantized", "kept") and (e.reason or e.status == "quantized") for e in report.coverage)
    blocks = [e for e in report.coverage if re.search(r"\.\d+\.", e.name)]
    assert {e.status for e in blocks} == {"quantized"}, [e for e in blocks if e.status != "quantized"]
    assert len(listed) == len(report.coverage)


KEPT = {
    "bert-classes": ["bert.pooler.dense", "classifier"],
    "bert-mlm": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
    "mixtral": ["lm_head", "model.layers.0.mlp.gate"],
    "vit": ["classifier"],
    "llama": ["lm_head", "model.embed_tokens"],
}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_heads_and_routers_are_kept(name: str, saved: Save) -> None:
    model = load(saved(name), name, quantization_config=rtn())
    assert not any(isinstance(model.get_submodule(kept), Packed) for kept in KEPT[name])


EMBEDDINGS = {  # what the user names -> modules that are quantized and share one table
    "llama": ("model.embed_tokens", ["model.embed_tokens"]),
    "llama-tied": ("lm_head", ["model.embed_tokens", "lm_head"]),
    "gemma3": ("*embed_tokens", ["model.embed_tokens", "lm_head"]),  # scales what it looks up
    "gpt2": ("transformer.wte", ["transformer.wte", "lm_head"]),
    "opt": ("*embed_positions", ["model.decoder.embed_positions"]),  # shifts the positions
    "bert-mlm": ("*word_embeddings", ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
    "mamba": ("backbone.embeddings", ["backbone.embeddings", "lm_head"]),
    "t5": ("shared", ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", sorted(EMBEDDINGS))
@pytest.mark.usefixtures("by_reference")
def test_embeddings_on_request(name: str, saved: Save, tmp_path: Path) -> None:
    pattern, modules = EMBEDDINGS[name]
    config = lambda: rtn(overrides={pattern: {"bits": 8}})  # noqa: E731
    model = check_round_trip(saved(name), name, config, tmp_path)
    tables = [model.get_submodule(m) for m in modules]
    assert all(isinstance(t, Packed) for t in tables)
    assert len({id(t.qweight) for t in tables}) == 1
    own = type(build(name).get_submodule(modules[0]))
    assert isinstance(tables[0], QuantEmbedding)
    assert isinstance(tables[0], own)
    dense = hf_quant.dequantize(model)
    assert type(dense.get_submodule(modules[0])) is own
    torch.testing.assert_close(logits(dense, name), logits(load(tmp_path / "once", name), name))


def test_time_steps_of_mamba_are_calibrated(saved: Save) -> None:
    """Its `dt_proj` is never called: the mixer multiplies with its weight."""
    model = load(saved("mamba"), "mamba", quantization_config=gptq("mamba"))
    steps = [e for e in report_of(model).coverage if ".dt_proj." in e.name]
    assert [e.error_of for e in steps] == ["output", "output"]


# ---- experts --------------------------------------------------------------------------------------------------------


def biased(name: str, folder: Path, expert: int = 3) -> Path:
    """A GPT-OSS whose routers never choose one expert."""
    model = build(name)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("router.bias"):
                weight[expert] = -1e4
    model.save_pretrained(folder)
    return folder


def test_an_expert_that_no_token_reaches_stops_the_run(saved: Save, tmp_path: Path) -> None:
    name, folder = "gpt-oss", biased("gpt-oss", tmp_path / "float")
    with pytest.raises(
        CalibrationError, match=r"model\.layers\.0\.mlp\.experts\.3\.\*, model\.layers\.1\.mlp"
    ) as caught:
        load(folder, name, quantization_config=gptq(name))
    allowed = re.search(r"allow=\[(.*)\]", str(caught.value))
    assert allowed is not None
    globs = re.findall(r'"(.*?)"', allowed[1])
    assert globs == ["model.layers.0.mlp.experts.3.*", "model.layers.1.mlp.experts.3.*"]

    untouched = load(folder, name)
    with pytest.raises(CalibrationError):
        hf_quant.quantize(untouched, gptq(name), progress=False)
    assert same(untouched, load(folder, name))

    model = check_round_trip(folder, name, lambda: gptq(name, allow=globs), tmp_path)
    missed = [e for e in report_of(model).coverage if e.reason]
    missed = [e for e in missed if e.status == "quantized"]
    assert {e.name.rpartition(".experts.")[2] for e in missed} == {"3.gate_up.weight", "3.down.weight"}
    plain = load(folder, name)
    take_apart(plain)
    for expert, rounded in ((3, True), (0, False)):
        for layer in ("gate_up", "down"):
            path = f"model.layers.0.mlp.experts.{expert}.{layer}"
            q = model.get_submodule(path).qtensor()
            codes = nearest(plain.get_submodule(path).weight, q.scale, q.zero, q.spec).codes
            assert torch.equal(codes, q.codes) is rounded


@pytest.mark.parametrize("skip", ["*.experts.*", "*.experts.1.*"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_may_be_kept(name: str, skip: str, saved: Save, tmp_path: Path) -> None:
    model = check_round_trip(saved(name), name, lambda: gptq(name, skip=[skip], allow=["*.experts.*"]), tmp_path)
    kept = [e for e in report_of(model).coverage if e.reason == "skipped by the user"]
    assert len(kept) == (16 if skip == "*.experts.*" else 4)


def test_experts_nobody_can_take_apart(saved: Save, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"experts\.gate_up_proj \(2, 64, 192\) in Llama4TextExperts"):
        load(saved("llama4"), "llama4", quantization_config=rtn())
    with pytest.raises(UnsupportedModel, match=r"allow=\['model\.layers\.1\.feed_forward\.experts\.\*'\]"):
        hf_quant.quantize(build("llama4"), rtn())
    allow = ["model.layers.1.feed_forward.experts.*"]
    model = check_round_trip(saved("llama4"), "llama4", lambda: rtn(allow=allow), tmp_path)
    unsupported = [e.name for e in report_of(model).coverage if e.status == "unsupported"]
    assert unsupported == [allow[0].replace("*", leaf) for leaf in ("gate_up_proj", "down_proj")]


# ---- vision and text ------------------------------------------------------------------------------------------------

VISION = ["model.vision_tower.*", "model.multi_modal_projector.*"]


def test_text_alone_does_not_calibrate_a_vision_tower(saved: Save, tmp_path: Path) -> None:
    """The run stops and says what is missing; the user then keeps the tower, or has it rounded."""
    text = [inputs("llama", rows=4, seed=5)]
    config = lambda **given: QuantConfig("gptq", bits=4, group_size=32, calibration=text, **given)  # noqa: E731
    with pytest.raises(
        CalibrationError, match=r'skip=\["model\.vision_tower\.\*", "model\.multi_modal_projector\.\*"\]'
    ):
        load(saved("llava"), "llava", quantization_config=config())

    kept = check_round_trip(saved("llava"), "llava", lambda: config(skip=VISION), tmp_path / "kept")
    status = {e.name.split(".")[1]: e.status for e in report_of(kept).coverage if ".layers." in e.name}
    assert status == {"vision_tower": "kept", "language_model": "quantized"}

    rounded = check_round_trip(saved("llava"), "llava", lambda: config(allow=VISION), tmp_path / "rounded")
    entries = [e for e in report_of(rounded).coverage if ".layers." in e.name]
    assert {e.status for e in entries} == {"quantized"}
    assert {(e.name.split(".")[1], e.error_of) for e in entries} == {
        ("vision_tower", "weight"),
        ("language_model", "output"),
    }


def test_a_static_range_of_inputs_nobody_saw_cannot_be_allowed(saved: Save) -> None:
    text = [inputs("llama", rows=4, seed=5)]
    with pytest.raises(CalibrationError, match="unless their inputs have a static range"):
        load(saved("llava"), "llava", quantization_config=QuantConfig("int8-default", calibration=text, allow=VISION))


# ---- one checkpoint, several classes --------------------------------------------------------------------------------


def states(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    prefix = model.base_model_prefix + "."
    return {k.removeprefix(prefix): v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_base_model_of_a_checkpoint_with_a_head_and_back(name: str, saved: Save, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(saved(name), quantization_config=rtn())
    whole.save_pretrained(tmp_path / "whole")
    base, found = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not found["missing_keys"]
    want = states(whole)
    assert all(torch.equal(value, want[key]) for key, value in states(base).items())
    assert true_bits(base) == true_bits(whole)

    base.save_pretrained(tmp_path / "base")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert found["missing_keys"] <= {"lm_head.weight"}  # which no base model has, as without quantization
    assert all(torch.equal(v, want[k]) for k, v in states(again).items() if k != "lm_head.weight")

    judge, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole", num_labels=3, pad_token_id=0, output_loading_info=True
    )
    assert found["missing_keys"] == {"score.weight"}
    assert all(torch.equal(v, want[k]) for k, v in states(judge).items() if k != "score.weight")


def test_quantized_under_another_class_than_it_was_saved_with(saved: Save) -> None:
    """The base model of a float checkpoint with a head, quantized on the way in, holds what the whole one holds."""
    whole = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=rtn())
    base = AutoModel.from_pretrained(saved("llama"), quantization_config=rtn())
    want = states(whole)
    assert all(torch.equal(value, want[key]) for key, value in states(base).items())


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_quantized_model_is_not_quantized_again(saved: Save, tmp_path: Path) -> None:
    model = load(saved("llama"), "llama", quantization_config=rtn())
    with pytest.raises(UnsupportedModel, match="quantized already"):
        hf_quant.quantize(model, rtn())


def test_a_pattern_must_match(saved: Save) -> None:
    typos = {"skip": ["model.layers.0.mlp.gate_pro"]}, {"overrides": {"model.layers.0.mlp.gate_pro": {"bits": 8}}}
    for given in typos:
        with pytest.raises(ConfigError, match="did you mean"):
            LlamaForCausalLM.from_pretrained(saved("llama"), quantization_config=rtn(**given))
