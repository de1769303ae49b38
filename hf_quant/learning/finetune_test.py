"""`finetune`, from Python and from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from typer.testing import CliRunner

import hf_quant
from hf_quant import QuantConfig
from hf_quant.cli.app import app
from hf_quant.errors import CalibrationError, ConfigError, NotSupported, RunError, UnsupportedModel, UnsupportedSpec
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.reconstruction import FisherMse
from hf_quant.testing.subjects import SUBJECTS

RANKS = [
    ("lr-qat", {"rank": 33}, r"rank=33 is above that of the \[32, 64\] matrix; use rank=32 or less"),
    ("l4q", {"rank": 33}, r"rank=33 is above that of the \[32, 64\] matrix; use rank=32 or less"),
    ("qlora", {"rank": 33}, r"rank=33 is above that of the \[32, 64\] matrix; use rank=32 or less"),
    ("qa-lora", {"rank": 3, "group_size": 32}, r"rank=3 is above that of the \[32, 2\] matrix of groups; use rank=2"),
]


def llama(blocks: int = 1) -> nn.Module:
    return SUBJECTS["llm"].model(blocks)


def tokens() -> Tensor:
    return torch.cat([batch["input_ids"] for batch in SUBJECTS["llm"].data()])


def test_only_methods_that_train(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match=r"use a method that does .*or quantize the model and train an adapter"):
        hf_quant.finetune(llama(), QuantConfig("gptq"), tokens())
    model = llama()
    report = hf_quant.finetune(model, QuantConfig("lr-qat", bits=3, block_steps=2, steps=2), tokens(), progress=False)
    assert report.training["steps"] == 2
    assert report.training["tokens"] == 2 * 8 * 32
    assert report.training["logit_difference"] < 1e-4 * report.training["logits"]
    with pytest.raises(UnsupportedModel, match="train an adapter on it"):
        hf_quant.finetune(model, QuantConfig("lr-qat"), tokens())
    with pytest.raises(UnsupportedModel, match="takes a model in memory, not str"):
        hf_quant.finetune("a/path", QuantConfig("lr-qat"), tokens())


def test_what_the_loop_cannot_train_is_refused_before_work() -> None:
    trainer = QuantConfig("lsq").quantizer().trainer
    repairs = QuantConfig("lqer").quantizer().repairs
    with pytest.raises(UnsupportedSpec, match="cannot have repairs too"):
        Recipe(weights=int_spec(4), repairs=repairs, trainer=trainer).quantize(llama(), Job(data=tokens()))
    smooth = replace(act_spec(), power=0.5)
    with pytest.raises(UnsupportedSpec, match="scales for columns cannot be trained with"):
        Recipe(weights=int_spec(4), inputs=smooth, trainer=trainer).quantize(llama(), Job(data=tokens()))
    with pytest.raises(ConfigError, match="FisherMse needs gradients"):
        replace(trainer, loss=FisherMse())


@pytest.mark.parametrize(("method", "given", "what"), RANKS)
def test_a_rank_that_a_matrix_cannot_have_is_refused_before_work(method: str, given: dict[str, int], what: str) -> None:
    """Every such layer is named; the data, which is nothing of the kind, is not looked at."""
    model, config = llama(2), QuantConfig(method, bits=4, **given)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedSpec, match=rf"layers\.0\.self_attn\.k_proj: Qat: {what}.*layers\.1"):
        hf_quant.finetune(model, config, object())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("static", [False, True])
def test_inputs_are_rounded_while_it_trains(static: bool) -> None:
    """What was trained is what runs, and a static step that is learned moves."""
    trainer = replace(QuantConfig("lsq", steps=2).quantizer().trainer, input_lr=0.1 * static)
    recipe = Recipe(weights=int_spec(4, 32), inputs=act_spec(4, static=static), trainer=trainer)
    models = [llama(), llama()]
    report = recipe.finetune(models[0], Job(data=tokens(), progress=False))
    replace(recipe, trainer=None).quantize(models[1], Job(data=tokens(), progress=False))
    assert report.training["logit_difference"] < 1e-4 * report.training["logits"]
    layers = [m.get_submodule("model.layers.0.mlp.up_proj") for m in models]
    assert layers[0].layer.inputs == layers[1].layer.inputs == recipe.inputs
    if static:
        moved = float((layers[0].input_scale / layers[1].input_scale).log().abs())
        assert 0.05 < moved < 0.25


def test_rows_that_cannot_be_put_together_are_refused() -> None:
    batches = [{"input_ids": tokens()[:4]}, {"input_ids": tokens()[:4], "attention_mask": torch.ones(4, 32).long()}]
    with pytest.raises(UnsupportedModel, match="differ in their shapes or in what they hold"):
        hf_quant.finetune(llama(), QuantConfig("lsq", steps=1, group_size=32), batches, progress=False)


def test_the_config_is_as_it_was() -> None:
    """The Trainer turns the cache off in the config, and models would be saved so."""
    model = llama()
    before = model.config.use_cache
    hf_quant.finetune(model, QuantConfig("lsq", bits=4, group_size=32, steps=1), tokens(), progress=False)
    assert model.config.use_cache == before


def test_one_training_takes_one_rounding() -> None:
    """Other bits are another spec; another rank would be another training, which would be left out in silence."""
    given = {"bits": 4, "rank": 2, "steps": 1, "group_size": 32}
    config = QuantConfig("lr-qat", block_steps=0, **given, overrides={"*.layers.0.*": {"rank": 4}})
    with pytest.raises(UnsupportedSpec, match=r"layers\.0.*trains otherwise than the rest"):
        hf_quant.finetune(llama(2), config, tokens())
    config = QuantConfig("gptq", overrides={"*.layers.0.*": {"method": "lsq"}})
    with pytest.raises(UnsupportedSpec, match="trains otherwise"):
        hf_quant.quantize(llama(2), config, data=tokens(), progress=False)
    model = llama(2)
    config = QuantConfig(
        "lr-qat", block_steps=0, **given, overrides={"*.up_proj": {"bits": 8}, "*.down_proj": {"method": "rtn"}}
    )
    report = hf_quant.finetune(model, config, tokens(), progress=False)
    bits = {e.name.split(".")[-2]: e.spec["grid"]["bits"] for e in report.quantized}
    assert (bits["up_proj"], bits["down_proj"], bits["q_proj"]) == (8, 4, 4)


def test_a_budget_is_trained_at_the_bits_it_chose() -> None:
    model = llama()
    config = QuantConfig("lr-qat", block_steps=0, budget="4.9 bits", rank=2, steps=1, group_size=32)
    report = hf_quant.finetune(model, config, tokens(), progress=False)
    assert len({e.spec["grid"]["bits"] for e in report.quantized}) > 1
    assert report.bits_per_weight == hf_quant.true_bits(model) <= 4.9


def test_rows_of_different_lengths_and_labels() -> None:
    """Padding is masked: it has no part in the loss. Checkpointed activations give the same codes."""
    ids = tokens()
    cut = [{"input_ids": ids[:4]}, {"input_ids": ids[4:6, :20]}, {"input_ids": ids[6:, :20]}]
    given = {"bits": 3, "group_size": 32, "rank": 2, "steps": 2, "batch_size": 8, "distill": 0.5}
    models, reports = [llama(), llama()], []
    for model, again in zip(models, (False, True), strict=True):
        config = QuantConfig("lr-qat", block_steps=0, **given, gradient_checkpointing=again)
        reports.append(hf_quant.finetune(model, config, cut, progress=False))
    assert reports[0].training["tokens"] == 2 * (4 * 32 + 4 * 20)
    assert reports[0].training["last_loss"] == pytest.approx(reports[1].training["last_loss"])
    assert not any(m.training for model in models for m in model.modules())


def test_norms_learn_beside_the_codes(tmp_path: Path) -> None:
    """Against a teacher that keeps its own; they are saved with the model, and cut-off training goes on with them."""
    given = {"bits": 3, "group_size": 32, "rank": 2, "steps": 4, "lr_norms": 1e-2}
    before, model = llama(), llama()
    report = hf_quant.finetune(
        model, QuantConfig("lr-qat", block_steps=0, **given, run_dir=tmp_path / "run"), tokens(), progress=False
    )
    assert report.training["logit_difference"] < 1e-4 * report.training["logits"]
    gains = {n: p for n, p in model.named_parameters() if n.endswith("norm.weight")}
    moved = {n: float((p - before.get_parameter(n)).detach().abs().max()) for n, p in gains.items()}
    assert min(moved.values()) > 0
    assert max(moved.values()) < 4 * 1e-2 * 1.01
    assert not any("parametrizations" in n for n, _ in model.named_modules())
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.get_parameter(n), p) for n, p in gains.items())
    again = llama()
    hf_quant.finetune(
        again, QuantConfig("lr-qat", block_steps=0, **given, run_dir=tmp_path / "run"), tokens(), progress=False
    )
    assert all(torch.equal(again.get_parameter(n), p) for n, p in gains.items())
    alone = llama()
    hf_quant.finetune(alone, QuantConfig("lr-qat", block_steps=0, **{**given, "lr_norms": 0}), tokens(), progress=False)
    assert all(torch.equal(alone.get_parameter(n), before.get_parameter(n)) for n in gains)


def test_without_a_teacher_the_model_runs_once_a_step() -> None:
    """`distill=0`: the texts alone, by the model's own loss."""
    runs = []
    for distill in (0.0, 1.0):
        model, calls = llama(), []
        hook = model.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        config = QuantConfig("lr-qat", block_steps=0, bits=3, group_size=32, rank=2, steps=3, distill=distill)
        hf_quant.finetune(model, config, tokens(), progress=False)
        hook.remove()
        runs.append((calls.count(True), len(calls)))
    assert [with_gradients for with_gradients, _ in runs] == [3, 3]
    assert runs[1][1] - runs[0][1] == 3  # the teacher's


def test_divergence_is_told() -> None:
    model = llama()
    model.lm_head.weight.data.fill_(1e38)
    config = QuantConfig("lr-qat", block_steps=0, bits=4, group_size=32, steps=9)
    with pytest.raises(RunError, match=r"training diverged: the loss is (nan|inf) at step \d of 9; give a smaller"):
        hf_quant.finetune(model, config, tokens(), progress=False)


def test_divergence_in_the_last_step_is_told() -> None:
    config = QuantConfig("qlora", bits=4, group_size=32, steps=1, lr=1e30)
    with pytest.raises(RunError, match="diverged in its last step"):
        hf_quant.finetune(llama(), config, tokens(), progress=False)


def test_a_resumed_training_reports_the_whole(tmp_path: Path) -> None:
    given = {"bits": 3, "group_size": 32, "rank": 2, "steps": 4, "run_dir": tmp_path}
    whole = hf_quant.finetune(llama(), QuantConfig("lr-qat", block_steps=0, **given), tokens(), progress=False)
    again = hf_quant.finetune(
        llama(), QuantConfig("lr-qat", block_steps=0, **given), tokens(), progress=False
    )  # nothing is left to do
    for name in ("tokens", "first_loss", "last_loss", "logit_difference"):
        assert again.training[name] == whole.training[name]


def test_a_model_with_transposed_weights() -> None:
    """GPT-2: what was trained is what runs."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    before = {n: p.requires_grad for n, p in model.named_parameters() if "wte" in n}
    report = hf_quant.finetune(model, QuantConfig("lsq", bits=4, group_size=32, steps=2), tokens(), progress=False)
    assert all(e.error < 0.05 for e in report.quantized)
    assert {n: p.requires_grad for n, p in model.named_parameters() if "wte" in n} == before
    assert not any("parametrizations" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_dropped_by_blocks_that_drop_by_themselves(again: bool) -> None:
    """OPT's blocks ask their own `training`, which is also what turns on that activations are computed again."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, dropout=0.5))
    config = QuantConfig("lsq", bits=8, group_size=32, steps=1, gradient_checkpointing=again)
    assert hf_quant.finetune(model, config, tokens(), progress=False).training["first_loss"] < 1e-4


def test_a_decoder_reads_what_its_labels_make() -> None:
    """While it is calibrated, trained and compared; padded labels are not counted."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    data, rows = {"input_ids": tokens(), "labels": tokens()[:, :20].clone()}, []
    data["labels"][:4, 10:] = -100
    hook = model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(out.flatten(0, -2))))
    config = QuantConfig("lr-qat", block_steps=0, bits=4, group_size=32, rank=2, steps=1)
    training = hf_quant.finetune(model, config, data, progress=False).training
    hook.remove()
    assert training["logit_difference"] < 1e-4 * training["logits"]
    assert set(rows) == {4 * 10, 4 * 20, 8 * 20, 10}  # never what the encoder reads; in the end one row


def test_an_answer_a_row_has_no_padding() -> None:
    """A classifier's logits have no positions that a mask of tokens could pick; a loss of its own needs labels."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).eval()
    data = {"input_ids": tokens(), "attention_mask": torch.ones(8, 32).long()}
    data["attention_mask"][:, 20:] = 0
    config = {"bits": 4, "group_size": 32, "steps": 1, "distill": 0.5}
    with pytest.raises(CalibrationError, match="BertForSequenceClassification needs labels"):
        hf_quant.finetune(model, QuantConfig("lsq", **config), data)
    data["labels"] = torch.arange(8) % 2
    training = hf_quant.finetune(model, QuantConfig("lsq", **config), data, progress=False).training
    assert training["tokens"] == 8 * 20
    assert training["first_loss"] == pytest.approx(0.5 * np.log(2), rel=0.1)


def test_experts_learn_as_every_matrix_does() -> None:
    """A gradient reaches those that some token went to; what was trained is what the packed experts compute."""
    subject = SUBJECTS["moe"]
    found = []
    for steps in (1, 40):
        config = QuantConfig("lsq", bits=2, group_size=32, steps=steps)
        model = subject.model(1)
        report = hf_quant.finetune(model, config, subject.data(), progress=False)
        packed = {n: m for n, m in model.named_modules() if ".experts." in n and isinstance(m, QuantLinear)}
        found.append({name: module.dequantize(torch.float32) for name, module in packed.items()})
        assert report.training["logit_difference"] < 1e-4 * report.training["logits"]
    assert report.training["last_loss"] < 0.95 * report.training["first_loss"]
    assert len(found[0]) == 8
    assert not any(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_teacher_is_in_full_precision() -> None:
    """Layers that another method rounds included; they are as they were made afterwards."""
    model, config = llama(), {"bits": 8, "group_size": 32, "steps": 1}
    coarse = {"*embed_tokens": {"method": "rtn", "bits": 2}, "*.down_proj": {"method": "rtn", "bits": 2}}
    config = QuantConfig("lsq", **config, overrides=coarse)
    training = hf_quant.finetune(model, config, tokens(), progress=False).training
    with torch.no_grad():
        said, right = (m(tokens()).logits.log_softmax(-1) for m in (model, llama()))
    assert training["first_loss"] == pytest.approx(float((right.exp() * (right - said)).sum(-1).mean()), rel=0.05)
    assert training["logit_difference"] < 1e-4 * training["logits"]


def test_float16_learns_what_float32_does() -> None:
    """Its smallest number is above nearly all gradients of so small a loss."""
    ups = []
    for dtype in (torch.float32, torch.float16):
        model = llama(2).half().to(dtype)
        config = QuantConfig("qlora", bits=8, group_size=32, rank=2, steps=1)
        hf_quant.finetune(model, config, tokens(), progress=False)
        ups.append(model.get_submodule("model.layers.1.mlp.down_proj").low_rank(torch.float32)[1])
    assert float((ups[0].sign() == ups[1].sign()).float().mean()) > 0.9


def test_a_process_trains_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several GPUs the Trainer would take a batch for each."""
    prepare = TrainingArguments.__post_init__

    def several(self: TrainingArguments) -> None:
        prepare(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", several)
    config = QuantConfig("qlora", bits=4, group_size=32, rank=2, steps=2, batch_size=2)
    assert hf_quant.finetune(llama(), config, tokens(), progress=False).training["tokens"] == 2 * 2 * 32


def test_one_step_is_one() -> None:
    """A warm-up takes a tenth of the steps: there is none of fewer than ten, and the first learns."""
    before, model = llama(), llama()
    hf_quant.finetune(model, QuantConfig("lsq", bits=4, group_size=32, steps=1), tokens(), progress=False)
    assert not torch.equal(model.get_parameter("model.norm.weight"), before.get_parameter("model.norm.weight"))


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
def test_what_is_no_learning_rate_is_refused(rate: float) -> None:
    for name in ("lr", "lr_scale", "lr_norms"):
        with pytest.raises(ConfigError, match=f"{name}=.*a learning rate"):
            QuantConfig("lr-qat", block_steps=0, **{name: rate}).quantizer()


def test_a_step_without_a_label_is_no_divergence() -> None:
    ids, config = tokens(), QuantConfig("lsq", bits=4, group_size=32, steps=1, distill=0.5)
    data = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert hf_quant.finetune(llama(), config, data, progress=False).training["last_loss"] < 0.1


def test_command(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", tokens().numpy())
    given = ["finetune", str(tmp_path / "model"), str(tmp_path / "out"), str(tmp_path / "ids.npy")]
    refused = CliRunner().invoke(app, [*given, "-m", "gptq"])
    assert isinstance(refused.exception, NotSupported)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*given, "-b", "3", "-g", "32", "--set", "steps=2", "--json"])
    assert done.exit_code == 0, done.output
    training = json.loads(done.stdout)["training"]
    assert training["logit_difference"] < 1e-4 * training["logits"]
    assert (
        f"logits differ by at most {training['logit_difference']:.1e}" in (tmp_path / "out" / "README.md").read_text()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.hf_quantizer.quantization_config.method == "lr-qat"
