"""The loop on a small Llama: its report, that it is deterministic, and that killed runs resume to the same bytes."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_quant
import hf_quant.loop
import hf_quant.running.run_dir
from hf_quant.config import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, RunError, UnsupportedModel, UnsupportedSpec
from hf_quant.report import Report
from hf_quant.runtime.linear import QuantLinear
from hf_quant.testing.subjects import SUBJECTS

IDS = torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(0))


def small_llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def run(model: LlamaForCausalLM, method: str = "gptq", **arguments: object) -> Report:
    config = QuantConfig(method, **{"group_size": 16, "bits": 3, **arguments})  # type: ignore[arg-type]
    return config.quantizer().quantize(model, config.job(data=IDS, progress=False))


def state(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_large_parameter_is_reported() -> None:
    model = small_llama()
    before = {n: p.numel() for n, p in model.named_parameters()}
    report = run(model)
    assert {e.name for e in report.coverage} == {n for n, size in before.items() if size > 1024}
    assert {e.status for e in report.coverage} == {"quantized", "kept"}
    assert next(e for e in report.coverage if e.name == "lm_head.weight").reason == "output head"
    assert len(report.quantized) == 3 * 7
    assert all(e.error is not None and 0 < e.error < 1 and e.error_of == "output" for e in report.quantized)
    assert report.bits_per_weight == pytest.approx(
        8 * stored_bytes(model) / 3 / (48 * 48 * 2 + 24 * 48 * 2 + 80 * 48 * 3)
    )


def stored_bytes(model: LlamaForCausalLM) -> int:
    tensors = {
        k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] in ("qweight", "scale", "zero_point")
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
def test_two_runs_give_the_same_bytes(method: str) -> None:
    a, b = small_llama(), small_llama()
    run(a, method)
    run(b, method)
    assert same(state(a), state(b))


def test_later_blocks_see_the_error_of_earlier_ones() -> None:
    """Quantizing block 0 more coarsely changes the codes of block 2, and only through its inputs."""
    a, b = small_llama(), small_llama()
    run(a)
    run(b, overrides={"model.layers.0.*": {"bits": 1}})
    assert not torch.equal(a.model.layers[2].mlp.down_proj.qweight, b.model.layers[2].mlp.down_proj.qweight)


def test_overrides_and_skip_decide_layer_by_layer() -> None:
    model = small_llama()
    report = run(
        model, overrides={"*.0.*.v_proj": None, "*.v_proj": {"bits": 8}, "lm_head": {"bits": 4}}, skip=["*.o_proj"]
    )
    status = {e.name.removesuffix(".weight"): (e.status, e.reason) for e in report.coverage}
    assert status["model.layers.0.self_attn.v_proj"] == ("kept", "kept by an override")
    assert status["model.layers.1.self_attn.o_proj"] == ("kept", "skipped by the user")
    assert status["lm_head"][0] == "quantized"
    assert model.model.layers[1].self_attn.v_proj.layer.weights.grid.bits == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"skip": ["*.q_porj"]}, ConfigError, "matches no layer"),
        ({"overrides": {"*.nothing": None}}, ConfigError, "matches no layer"),
        ({"skip": ["q_proj"]}, ConfigError, r"did you mean '\*\.q_proj'"),
        ({"skip": ["model.layers.0"]}, ConfigError, r"did you mean 'model\.layers\.0\.\*'"),
        ({"overrides": {"lm_head.weight": None}}, ConfigError, "did you mean 'lm_head'"),
        ({"skip": ["*"]}, UnsupportedModel, "nothing to quantize"),
        ({"device": "cuda:77"}, ConfigError, "device='cuda:77': there is no such device here"),
    ],
)
def test_mistakes_are_found_before_anything_is_touched(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    model = small_llama()
    before = state(model)
    with pytest.raises(error, match=message):
        run(model, **arguments)
    assert same(state(model), before)


def test_calibrated_methods_ask_for_data() -> None:
    config = QuantConfig("gptq")
    with pytest.raises(CalibrationError):
        config.quantizer().quantize(small_llama(), config.job())


def test_a_batch_that_the_model_does_not_take_is_named() -> None:
    config = QuantConfig("gptq", group_size=16, bits=3)
    with pytest.raises(CalibrationError, match=r"cannot run on calibration batch 0 \(ids \[6, 24\]\): .*input_ids"):
        config.quantizer().quantize(small_llama(), config.job(data=[{"ids": IDS}], progress=False))


def test_a_hook_that_a_quantized_layer_would_not_run_is_refused() -> None:
    model = small_llama(1)
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, out: 2 * out)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj has forward hooks"):
        run(model)
    handle.remove()
    assert run(model).quantized


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_module_that_stands_in_two_places_is_one_layer_in_both(method: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.c = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    model, x = Twice(), torch.randn(8, 32)
    hf_quant.quantize(model, QuantConfig(method, group_size=32), data=[{"x": x}], progress=False)
    assert isinstance(model.a, QuantLinear)
    assert model.c is model.a


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj"):
        run(model, "rtn")


# ---- runs that are cut short ------------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for a Ctrl-C at a random moment."""


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_llama()
    report = run(whole, method)
    solve, calls = hf_quant.loop.solve_on, []

    def cut(*args: object) -> object:
        calls.append(1)
        if len(calls) == 12:  # in the middle of the second block
            raise Cut
        return solve(*args)

    monkeypatch.setattr(hf_quant.loop, "solve_on", cut)
    with pytest.raises(Cut):
        run(small_llama(), method, run_dir=tmp_path / "run")
    solved_before = len(calls)
    resumed = small_llama()
    again = run(resumed, method, run_dir=tmp_path / "run")
    assert len(calls) - solved_before == 2 * 7  # the first block was not solved again
    assert same(state(resumed), state(whole))
    assert [(e.name, e.error) for e in again.coverage] == [(e.name, e.error) for e in report.coverage]


def test_another_job_does_not_resume_it(tmp_path: Path) -> None:
    run(small_llama(), run_dir=tmp_path)
    with pytest.raises(RunError, match="another job"):
        run(small_llama(), run_dir=tmp_path, bits=4)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    lock = hf_quant.running.run_dir.hold(tmp_path)
    with pytest.raises(RunError, match="another run"):
        run(small_llama(), run_dir=tmp_path)
    lock.close()


def test_a_full_disk_keeps_the_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small_llama()
    run(whole)
    save, written = hf_quant.running.run_dir.save_file, []

    def full(*args: object, **kwargs: object) -> None:
        written.append(1)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(hf_quant.running.run_dir, "save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        run(small_llama(), run_dir=tmp_path)
    assert not list(tmp_path.glob("*.part"))
    resumed = small_llama()
    run(resumed, run_dir=tmp_path)
    assert same(state(resumed), state(whole))


def child(run_dir: Path, out: Path) -> None:
    model = small_llama(layers=6)
    run(model, run_dir=run_dir)
    torch.save(model.state_dict(), out)


@pytest.mark.usefixtures("one_thread")  # a forked child cannot use the threads of its parent
def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    run(small_llama(layers=1))  # what is done once a process is done in no child
    whole = small_llama(layers=6)
    began = time.perf_counter()
    run(whole)
    length = time.perf_counter() - began
    kills, dice = 0, random.Random(0)
    process = None
    while process is None or process.exitcode != 0:
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(tmp_path / "run", tmp_path / "out.pt")
        )
        process.start()
        process.join(dice.uniform(0.2, 0.9) * length if kills < 6 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
    assert kills >= 1
    assert same(torch.load(tmp_path / "out.pt"), state(whole))


def test_two_streams_are_refused_where_there_is_one() -> None:
    """Before any work: outside the blocks there is no second stream."""
    subject = SUBJECTS["vlm"]
    with pytest.raises(UnsupportedSpec, match=r"linear_1: .*outside"):
        hf_quant.estimate(subject.model(), QuantConfig("gptaq"))
    config = QuantConfig("gptaq", overrides={"model.multi_modal_projector.*": {"method": "gptq"}})
    hf_quant.quantize(model := subject.model(), config, data=subject.data(), progress=False)
    assert subject.output(model).isfinite().all()


def test_experts_are_compared_on_the_tokens_that_they_get() -> None:
    """Routers of the two paths differ, and a method of two streams quantizes experts all the same."""
    subject = SUBJECTS["moe"]
    config = QuantConfig("gptaq", bits=2, group_size=32)
    report = hf_quant.quantize(model := subject.model(), config, data=subject.data(), progress=False)
    assert {e.error_of for e in report.quantized if ".experts." in e.name} == {"output"}
    assert subject.output(model).isfinite().all()
