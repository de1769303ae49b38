import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_quant.data.calibration import spread_windows
from hf_quant.errors import CalibrationError, CheckpointError, NotSupported, RunError, UnsupportedModel
from hf_quant.measure.evaluate import evaluate, lm_eval, score
from hf_quant.measure.evaluation import Evaluation
from hf_quant.measure.reference_logits import store

TIMES = {"seconds", "peak_bytes", "tokens_per_second"}


def llama(seed=0, vocab=96):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def full():
    return llama()


@pytest.fixture(scope="module")
def rough(full):
    """The same model with its weights on a coarse grid."""
    model = llama()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                step = module.weight.abs().max() / 3
                module.weight.copy_((module.weight / step).round() * step)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (200,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return folder


SETTINGS = {"window": 16, "tokens": 96, "batch_size": 2}  # 6 windows, 3 batches


def quality(evaluation):
    return {k: v for k, v in evaluation.to_json().items() if k not in TIMES}


def test_the_figures_are_their_definitions(full, rough, ids):
    windows = spread_windows(ids, None, 16, 96)
    with torch.no_grad():
        q, p = (m(windows).logits.double().log_softmax(-1) for m in (rough, full))
    got = evaluate(rough, full, ids, **SETTINGS)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    nll = F.cross_entropy(q[:, :-1].reshape(-1, 96), windows[:, 1:].reshape(-1), reduction="none").reshape(6, 15)
    reference_nll = F.cross_entropy(p[:, :-1].reshape(-1, 96), windows[:, 1:].reshape(-1))
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-6)
    assert got.kl > 1e-4
    assert got.kl_error == pytest.approx(kl.mean(1).std().item() / math.sqrt(6), rel=1e-5)
    assert got.top1 == pytest.approx(100 * (q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert got.perplexity == pytest.approx(math.exp(nll.mean().item()), rel=1e-6)
    assert got.perplexity_error == pytest.approx(got.perplexity * nll.mean(1).std().item() / math.sqrt(6), rel=1e-5)
    assert got.reference_perplexity == pytest.approx(math.exp(reference_nll.item()), rel=1e-6)
    increase = nll.mean(1) - F.cross_entropy(
        p[:, :-1].reshape(-1, 96), windows[:, 1:].reshape(-1), reduction="none"
    ).reshape(6, 15).mean(1)
    assert got.loss_increase == pytest.approx(increase.mean().item(), rel=1e-4)
    assert got.loss_increase_error == pytest.approx(increase.std().item() / math.sqrt(6), rel=1e-4)
    assert (got.windows, got.window, got.tokens) == (6, 16, 96)
    assert got.tokens_per_second > 0
    assert got.peak_bytes > 1e6
    assert got.dtype == "float32"


def test_a_model_agrees_with_itself(full, ids):
    got = evaluate(full, full, ids, **SETTINGS)
    assert got.kl == 0
    assert got.top1 == 100
    assert got.perplexity == got.reference_perplexity


def test_without_a_reference_nothing_is_compared(full, ids):
    got = evaluate(full, None, ids, **SETTINGS)
    assert (got.kl, got.kl_error, got.top1, got.top1_error, got.reference_perplexity, got.loss_increase) == (None,) * 6
    assert got.perplexity == pytest.approx(evaluate(full, full, ids, **SETTINGS).perplexity)
    assert got.bits_per_weight is None
    assert got.bytes_on_disk is None


def test_long_windows_are_scored_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(33, 50, generator=generator) for _ in range(2))
    ids = torch.randint(0, 50, (33,), generator=generator)
    whole = score(logits, ids, reference)
    monkeypatch.setattr("hf_quant.measure.evaluate.COMPARED", 7 * 50)
    assert score(logits, ids, reference) == pytest.approx(whole, rel=1e-12)


def test_an_impossible_token_costs_nothing():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    assert score(logits, torch.tensor([0, 1]), logits)[1] == 0


def test_batches_change_nothing_but_rounding(full, rough, ids):
    one = evaluate(rough, full, ids, window=16, tokens=96, batch_size=1)
    four = evaluate(rough, full, ids, window=16, tokens=96, batch_size=4)
    assert one.kl == pytest.approx(four.kl, rel=1e-4)
    assert one.perplexity == pytest.approx(four.perplexity, rel=1e-5)


def test_json_round_trip(full, ids, tmp_path):
    got = evaluate(full, None, ids, **SETTINGS)
    got.save(tmp_path / "evaluation.json")
    assert Evaluation.from_json(json.loads((tmp_path / "evaluation.json").read_text())) == got


def test_training_mode_is_given_back(full, ids):
    model = llama()
    model.train()
    model.lm_head.eval()
    evaluate(model, None, ids, window=16, tokens=16)
    assert model.training
    assert not model.lm_head.training


def test_batch_norm_like_state_is_not_touched(ids):
    """Dropout is off while measuring, whatever the mode before."""
    model = llama()
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    first = evaluate(model, None, ids, **SETTINGS)
    assert evaluate(model, None, ids, **SETTINGS).perplexity == first.perplexity


class TestResume:
    def test_goes_on_to_the_identical_result(self, full, rough, ids, tmp_path):
        log = tmp_path / "run.jsonl"
        whole = evaluate(rough, full, ids, **SETTINGS)
        assert quality(evaluate(rough, full, ids, **SETTINGS, resume=log)) == quality(whole)
        complete = log.read_bytes()
        for cut in range(0, len(complete), 29):  # as a kill at any byte would leave it
            log.write_bytes(complete[:cut])
            assert quality(evaluate(rough, full, ids, **SETTINGS, resume=log)) == quality(whole)

    def test_does_not_run_finished_batches_again(self, full, ids, tmp_path, monkeypatch):
        calls = []
        model = llama()
        inner = model.forward

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
        log = tmp_path / "run.jsonl"
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, None, ids, **SETTINGS, resume=log)
        got = evaluate(model, None, ids, **SETTINGS, resume=log)
        assert len(calls) == 4  # 2 done, 1 interrupted, 1 left
        assert quality(got) == quality(evaluate(llama(), None, ids, **SETTINGS))

    @pytest.mark.parametrize("other", [{"batch_size": 3}, {"tokens": 64}, {"model": 1}, {"data": 1}])
    def test_refuses_the_log_of_another_evaluation(self, full, ids, tmp_path, other):
        log = tmp_path / "run.jsonl"
        evaluate(full, None, ids, **SETTINGS, resume=log)
        settings = {**SETTINGS, **{k: v for k, v in other.items() if k in SETTINGS}}
        model = llama(seed=1) if "model" in other else full
        data = ids.flip(0) if "data" in other else ids
        with pytest.raises(RunError, match="belongs to another evaluation"):
            evaluate(model, None, data, **settings, resume=log)

    def test_refuses_a_file_that_is_no_log(self, full, ids, tmp_path):
        log = tmp_path / "notes.txt"
        log.write_text("my notes\n")
        with pytest.raises(RunError, match="belongs to another evaluation"):
            evaluate(full, None, ids, **SETTINGS, resume=log)
        assert log.read_text() == "my notes\n"


class TestStoredLogits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_are_exact(self, rough, ids, tmp_path, dtype):
        full = llama().to(dtype)
        store(full, ids, tmp_path / "logits", window=16, tokens=96, batch_size=2)
        live, stored = (quality(evaluate(rough, r, ids, **SETTINGS)) for r in (full, tmp_path / "logits"))
        for differ in ("peak_holds", "command"):
            assert live.pop(differ) != stored.pop(differ)
        assert live == stored

    def test_of_other_windows_are_refused(self, full, ids, tmp_path):
        store(full, ids, tmp_path, window=16, tokens=96)
        with pytest.raises(RunError, match="stored for other data"):
            evaluate(full, tmp_path, ids, window=16, tokens=64)

    def test_are_never_overwritten(self, full, ids, tmp_path):
        store(full, ids, tmp_path, window=16, tokens=32)
        with pytest.raises(RunError, match="already holds"):
            store(full, ids, tmp_path, window=16, tokens=32)

    def test_truncated_are_refused(self, full, ids, tmp_path):
        store(full, ids, tmp_path, window=16, tokens=96)
        file = tmp_path / "logits.npy"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(RunError, match="store the logits again"):
            evaluate(full, tmp_path, ids, **SETTINGS)


class TestPaths:
    def test_model_and_reference_from_a_folder(self, full, ids, folder):
        got = evaluate(str(folder), folder, ids, **SETTINGS)
        assert got.kl == 0
        assert got.perplexity == pytest.approx(evaluate(full, None, ids, **SETTINGS).perplexity, rel=1e-6)
        assert got.bytes_on_disk == (folder / "model.safetensors").stat().st_size

    def test_a_model_quantized_since_is_not_weighed_by_its_old_files(self, ids, folder, monkeypatch):
        model = LlamaForCausalLM.from_pretrained(folder)
        ledger = types.ModuleType("hf_quant.ledger")
        ledger.true_bits = lambda m: 4.25
        monkeypatch.setitem(sys.modules, "hf_quant.ledger", ledger)
        model.config.quantization_config = {"quant_method": "hf_quant"}
        got = evaluate(model, None, ids, **SETTINGS)
        assert got.bytes_on_disk is None
        assert got.bits_per_weight == 4.25

    def test_no_model_there(self, full, ids, tmp_path):
        for model, reference in ((tmp_path, None), (full, tmp_path)):
            with pytest.raises(UnsupportedModel, match=r"holds no config\.json"):
                evaluate(model, reference, ids, **SETTINGS)
        for model, reference in (("./no/such", None), (full, tmp_path / "no")):
            with pytest.raises(CheckpointError, match="there is no folder"):
                evaluate(model, reference, ids, **SETTINGS)


class TestErrors:
    def test_no_data(self, full):
        with pytest.raises(CalibrationError, match="got none"):
            evaluate(full, None)

    def test_texts_without_a_tokenizer(self, full):
        with pytest.raises(CalibrationError, match="tokenizer"):
            evaluate(full, None, ["some text"])

    def test_too_little_data(self, full, ids):
        with pytest.raises(CalibrationError, match="200 tokens make no window of 512"):
            evaluate(full, None, ids)

    def test_a_window_longer_than_the_model(self, full, ids):
        with pytest.raises(CalibrationError, match="pass window=64 or less"):
            evaluate(full, None, ids, window=65, tokens=65)

    def test_another_models_tokens(self, ids):
        with pytest.raises(CalibrationError, match="outside the model's vocabulary of 90"):
            evaluate(llama(vocab=90), None, ids, **SETTINGS)

    def test_another_vocabulary(self, full, ids):
        with pytest.raises(UnsupportedModel, match="not the same vocabulary"):
            evaluate(full, llama(vocab=128), ids, **SETTINGS)

    def test_logits_that_are_not_numbers(self, ids):
        model = llama()
        model.lm_head.weight.data[0] = torch.nan
        with pytest.raises(RunError, match="logits of window 0 hold NaN"):
            evaluate(model, None, ids, **SETTINGS)

    def test_not_a_language_model(self, ids):
        class Other(nn.Linear):
            def forward(self, input_ids, use_cache):
                return input_ids

        with pytest.raises(UnsupportedModel, match="gives no logits"):
            evaluate(Other(1, 1), None, ids, **SETTINGS)


class TestHarness:
    def test_missing_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(NotSupported, match=r"pip install 'hf-quant\[eval\]'"):
            lm_eval(None, None, ["arc_easy"])

    def test_hands_the_model_over(self, monkeypatch, full):
        seen = {}
        harness, models, huggingface = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.hf"))
        huggingface.HFLM = lambda **given: seen.update(given) or "wrapped"
        harness.simple_evaluate = lambda **given: seen.update(given) or {"results": {"arc_easy": {"acc,none": 0.5}}}
        monkeypatch.setitem(sys.modules, "lm_eval", harness)
        monkeypatch.setitem(sys.modules, "lm_eval.models", models)
        monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
        assert lm_eval(full, "tokenizer", ("arc_easy",), limit=3) == {"arc_easy": {"acc,none": 0.5}}
        assert seen == {
            "pretrained": full,
            "tokenizer": "tokenizer",
            "batch_size": 8,
            "model": "wrapped",
            "tasks": ["arc_easy"],
            "limit": 3,
        }


def test_the_trained_model_on_its_test_text(tiny_lm_path):
    """Texts are tokenized by the tokenizer that lies beside the model. An untrained one would have 2048."""
    data = tiny_lm_path.parents[1] / "data" / "python_docs_test.txt"
    got = evaluate(tiny_lm_path, None, data, window=256, tokens=2048)
    assert got.windows == 8
    assert 10 < got.perplexity < 40
    assert got.bytes_on_disk == (tiny_lm_path / "model.safetensors").stat().st_size
