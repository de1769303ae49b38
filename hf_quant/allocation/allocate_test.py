"""A run with a budget: what is chosen fits, is deterministic and resumes; what cannot fit is refused at once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_quant
import hf_quant.allocation.allocate
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError, PluginError, UnsupportedSpec
from hf_quant.ledger import count_bits
from hf_quant.method import method_named
from hf_quant.recipe import Recipe
from hf_quant.report import Report
from hf_quant.stages.allocator import Rounded, Slot, standing_in
from hf_quant.stages.sampler import Batch
from hf_quant.testing.conformance import brief

IDS = torch.randint(0, 97, (6, 24), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def run(model: nn.Module, budget: Any = "4 bits", method: str = "rtn", **arguments: Any) -> Report:
    config = QuantConfig(method, group_size=16, budget=budget, **{**brief(method_named(method)), **arguments})
    return hf_quant.quantize(model, config, data=IDS, progress=False)


def widths(report: Report) -> dict[str, int]:
    return {e.name.removesuffix(".weight"): e.spec["grid"]["bits"] for e in report.quantized if e.spec}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
@pytest.mark.parametrize("bits", [3.6, 5.0, 40 / 9])
def test_true_bits_are_within_the_budget_and_near_it(method: str, bits: float) -> None:
    model = llama()
    report = run(model, f"{bits} bits", method)
    assert hf_quant.true_bits(model) == pytest.approx(report.bits_per_weight)
    assert bits - 0.15 < report.bits_per_weight <= bits
    assert len(set(widths(report).values())) > 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"*embed_tokens": {}}, {"*embed_tokens": {"bits": 8}}])
def test_bytes_count_everything_that_is_stored(tied: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    lowest = hf_quant.estimate(llama(tied=tied), QuantConfig("rtn", group_size=16, budget="1 GB", overrides=overrides))
    size = lowest["lowest"]["model_bytes"] + 7000
    model = llama(tied=tied)
    run(model, f"{size} bytes", overrides=overrides)
    assert size - 1500 < count_bits(model).bytes <= size
    model.save_pretrained(tmp_path)
    files = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert files < size + 300 * len(model.state_dict())  # the header
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded(IDS).logits.equal(model(IDS).logits)


def test_what_is_estimated_is_what_can_be_reached() -> None:
    config = QuantConfig(
        "rtn", group_size=16, budget="4 bits", overrides={"*.0.*.o_proj": {"bits": 8}}, skip=["*.v_proj"]
    )
    found = hf_quant.estimate(llama(), config)
    assert found["needs_calibration"]
    assert found["bits_per_weight"] == pytest.approx(4, abs=1e-4)
    for end, width in (("lowest", 2), ("highest", 8)):
        model = llama()
        fixed = replace_widths(config, [width])
        hf_quant.quantize(model, fixed, data=IDS, progress=False)
        assert count_bits(model).bytes == found[end]["model_bytes"]
        assert hf_quant.true_bits(model) == pytest.approx(found[end]["bits_per_weight"])
    roomy = hf_quant.estimate(llama(), QuantConfig("rtn", group_size=16, budget="1 GB"))
    assert roomy["model_bytes"] == roomy["highest"]["model_bytes"]


def replace_widths(config: QuantConfig, widths: list[int]) -> QuantConfig:
    return QuantConfig.from_dict(config.to_dict() | {"budget": {"size": "16 bits", "widths": widths}})


@pytest.mark.parametrize("budget", ["2.5 bits", "20000 bytes", "0.001 MB"])
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(budget: str, tmp_path: Path) -> None:
    config = QuantConfig("gptq", group_size=16, budget=budget)
    model = llama()
    before = state(model)
    for attempt in (
        lambda: hf_quant.estimate(model, config),
        lambda: hf_quant.quantize(model, config, data=IDS),
        lambda: from_disk(tmp_path, config),
    ):
        with pytest.raises(UnsupportedSpec, match=r"cannot be met: .*3\.\d+ bits a weight \(\d+ bytes.* at the most"):
            attempt()
    assert same(state(model), before)


def from_disk(folder: Path, config: QuantConfig) -> None:
    llama().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4096] + bytes(4096))  # refused although this is never read
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_all_fixed_leaves_nothing_to_choose() -> None:
    with pytest.raises(UnsupportedSpec, match="no layer whose bits"):
        run(llama(), overrides={"*_proj": {"bits": 4}})


def test_sites_that_read_one_tensor_share_a_choice_unless_told_otherwise() -> None:
    fused = widths(run(llama()))
    for layer in (0, 1):
        at = f"model.layers.{layer}."
        assert len({fused[f"{at}self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({fused[f"{at}mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    free = widths(run(llama(), {"size": "4 bits", "fused": False}))
    assert any(len({free[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv"}) > 1 for i in (0, 1))


def test_overrides_and_skip_hold_and_count() -> None:
    overrides = {"*.0.*.q_proj": {"bits": 8}, "*.1.*.o_proj": None}
    model = llama()
    report = run(model, "4 bits", overrides=overrides, skip=["*.1.*.down_proj"])
    found = widths(report)
    assert found["model.layers.0.self_attn.q_proj"] == 8
    assert found["model.layers.0.self_attn.k_proj"] == found["model.layers.0.self_attn.v_proj"]
    assert not {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"} & found.keys()
    assert 3.85 < hf_quant.true_bits(model) <= 4


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_two_runs_give_the_same_bytes_and_saving_keeps_the_budget(method: str, tmp_path: Path) -> None:
    a, b = llama(), llama()
    run(a, method=method)
    run(b, method=method)
    assert same(state(a), state(b))
    a.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["made_by"]["budget"] == "4 bits"
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits.equal(a(IDS).logits)


class Cut(Exception):
    """Stands for a Ctrl-C."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_resumes_to_the_same_bytes(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before the second block's losses, before the third's, and in pass 2: no row of the table is filled twice."""
    whole = llama(3)
    run(whole, method="gptq")
    rounding, asked = hf_quant.allocation.allocate._rounding, []

    def cut(*args: Any) -> Any:
        asked.append(1)
        if len(asked) == at + 1:
            raise Cut
        return rounding(*args)

    monkeypatch.setattr(hf_quant.allocation.allocate, "_rounding", cut)
    if at == 3:
        monkeypatch.setattr(hf_quant.running.run_dir.RunDir, "save", lambda *_: (_ for _ in ()).throw(Cut()))
    with pytest.raises(Cut):
        run(llama(3), method="gptq", run_dir=tmp_path / "run")
    monkeypatch.setattr(hf_quant.allocation.allocate, "_rounding", lambda *a: asked.append(1) or rounding(*a))
    if at == 3:
        monkeypatch.undo()
    before = len(asked)
    resumed = llama(3)
    run(resumed, method="gptq", run_dir=tmp_path / "run")
    assert len(asked) - before == (3 - at if at < 3 else 0)
    assert same(state(resumed), state(whole))


@dataclass(frozen=True)
class Looks:
    """Compares what it is lent with the weights it was given, and leaves no opinion."""

    seen: list[tuple[str, int, float]]

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        originals = {n: p.detach() for n, p in llama().named_parameters()}
        for slot in slots:
            for name in slot.sites:
                for spec in slot.choices:
                    with standing_in(model, {name: torch.zeros_like(model.get_submodule(name).weight)}):
                        W = originals[f"{name}.weight"]
                        error = float((rounded(name, spec) - W).norm() / W.norm())
                    self.seen.append((name, int(spec.grid.bits), error))
        return [tuple(float(i) for i, _ in enumerate(slot.choices)) for slot in slots]

    __hash__ = object.__hash__


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounded_reads_the_original_weights(method: str) -> None:
    """Every error is that of rounding once, falls with the bits, and does not grow from block to block."""
    config = QuantConfig(method, group_size=16, budget="4 bits")
    recipe, looks = config.quantizer(), Looks([])
    assert isinstance(recipe, Recipe)
    assert recipe.allocator is not None
    recipe = replace(recipe, allocator=replace(recipe.allocator, sensitivity=looks))
    recipe.quantize(llama(), config.job(data=IDS, progress=False))
    errors: dict[str, list[float]] = {}
    for name, _, error in looks.seen:
        errors.setdefault(name, []).append(error)
    assert len(errors) == 14
    for row in errors.values():
        assert row == sorted(row, reverse=True)
        assert row[0] < 0.6
        assert row[-1] < 0.01
    first, last = (sum(row[2] for n, row in errors.items() if f"layers.{i}." in n) for i in (0, 1))
    assert last < 1.2 * first


def test_a_model_is_left_as_it_was_found() -> None:
    """Tied, transposed, with what stands in raising: weights are the same objects again."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    before = dict(model.named_parameters())
    logits = model(IDS).logits
    W = model.transformer.h[0].attn.c_attn.weight.T.clone()
    with standing_in(model, {"transformer.h.0.attn.c_attn": W}):
        assert model(IDS).logits.equal(logits)
    try:
        with standing_in(model, {"transformer.wte": torch.zeros(97, 32)}):
            assert not model.lm_head.weight.any()
            raise Cut
    except Cut:
        pass
    assert all(before[n] is p for n, p in model.named_parameters())
    report = hf_quant.quantize(model, QuantConfig("gptq", group_size=16, budget="4 bits"), data=IDS, progress=False)
    assert 3.8 < report.bits_per_weight <= 4


def test_layers_no_token_reaches_are_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_quant.pipeline, "allocate", lambda *_: pytest.fail("measured first"))
    model = llama()
    model.model.layers[1].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(CalibrationError, match="no calibration token"):
        run(model, method="gptq")


def test_a_budget_needs_data() -> None:
    with pytest.raises(CalibrationError):
        hf_quant.quantize(llama(), QuantConfig("rtn", budget="4 bits"), progress=False)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (lambda slots: [(1.0,) * len(s.choices) for s in slots][1:], "every choice of every slot"),
        (lambda slots: [(1.0,) * len(s.choices[1:]) for s in slots], "every choice of every slot"),
        (lambda slots: [(float("nan"),) * len(s.choices) for s in slots], r"q_proj.* are \[nan"),
    ],
)
def test_losses_that_are_no_table_are_refused(losses: Any, told: str) -> None:
    @dataclass(frozen=True)
    class Theirs:
        def losses(self, model: nn.Module, slots: Sequence[Slot], *_: object) -> list[tuple[float, ...]]:
            return losses(slots)

    with pytest.raises(PluginError, match=f"Theirs: .*{told}"):
        allocated(sensitivity=Theirs())


@pytest.mark.parametrize(
    ("pick", "told"),
    [
        (lambda bits: [len(b) - 1 for b in bits], "bits, and there is room for"),  # above the budget
        (lambda bits: [-1 for _ in bits], "are no choices"),
        (lambda bits: [0], "are no choices"),
    ],
)
def test_picks_that_break_the_budget_are_refused(pick: Any, told: str) -> None:
    @dataclass(frozen=True)
    class Theirs:
        def pick(self, bits: Sequence[Sequence[int]], losses: object, budget: int) -> list[int]:
            return pick(bits)

    with pytest.raises(PluginError, match=f"Theirs: .*{told}"):
        allocated(search=Theirs())


def allocated(**changed: Any) -> None:
    recipe = QuantConfig("rtn", group_size=16, budget="4 bits").quantizer()
    assert isinstance(recipe, Recipe)
    assert recipe.allocator is not None
    job = QuantConfig("rtn").job(data=IDS, progress=False)
    replace(recipe, allocator=replace(recipe.allocator, **changed)).quantize(llama(1), job)
