"""The reconstruction engine in the loop: every kind of unit, resumed runs, what is refused, what is left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ViTConfig,
)

from hf_quant import QuantConfig
from hf_quant.errors import ConfigError, UnsupportedModel, UnsupportedSpec
from hf_quant.grids import IntGrid
from hf_quant.learning.tuning import Surroundings
from hf_quant.ledger import true_bits
from hf_quant.pipeline import quantize
from hf_quant.plugins.rounding.gptq import gptq
from hf_quant.plugins.rounding.lsq_ptq import Places
from hf_quant.plugins.transforms.awq import awq
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.sites import Site
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.reconstruction import FisherMse, Kl, Mse, Reconstruction
from hf_quant.stages.tuner import (
    BlockUnits,
    Chain,
    Example,
    Fitted,
    LayerUnits,
    ModelUnit,
    Unit,
    UnitLoss,
    Units,
    WindowUnits,
)

ROUNDING = Places(lr=0.02, scale_lr=1e-3)  # a few steps turn some weights


BLOCKWISE, MSE = BlockUnits(), Mse()


def recipe(units: Units = BLOCKWISE, loss: UnitLoss = MSE, **more: Any) -> Recipe:
    tuner = Reconstruction(ROUNDING, loss=loss, steps=8, checks=2)
    return replace(Recipe(weights=int_spec(3, 32), units=units, tuner=tuner), **more)


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=96, **shape)).eval()
    return model


def ids() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 96, (2, 16), generator=generator)} for _ in range(3)]


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(3)]


def run(model: nn.Module, how: Recipe, **job: Any) -> dict[str, Tensor]:
    quantize(model, how, Job(**{"data": ids(), "progress": False, **job}))
    return dict(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(x.equal(b[n]) for n, x in a.items())


def error(model: nn.Module, batches: Sequence[dict[str, Tensor]], original: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((model(**b).logits - original(**b).logits).square().mean()) for b in batches)


KINDS = {
    "blocks": (BlockUnits(), Mse()),
    "fisher": (BlockUnits(), FisherMse()),
    "layers": (LayerUnits(), Mse()),
    "windows": (WindowUnits(2, 1), Mse()),
    "model": (ModelUnit(), Kl()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_unit_is_fitted_twice_the_same(kind: str) -> None:
    """The codes differ from the solver's, the output comes closer, nothing of the tuning is left in the model."""
    units, loss = KINDS[kind]
    solved, tuned, again = llama(), llama(), llama()
    before, after = run(solved, replace(recipe(), tuner=None)), run(tuned, recipe(units, loss))
    assert same(after, run(again, recipe(units, loss)))
    assert not same(after, run(llama(), recipe(units, loss), seed=7))
    assert list(before) == list(after)
    moved = {n.rpartition(".")[0] for n in after if n.endswith("qweight") and not after[n].equal(before[n])}
    assert {n.split(".")[2] for n in moved} == {"0", "1", "2"}
    assert error(tuned, ids(), llama()) < error(solved, ids(), llama())
    assert all(type(m) in (QuantLinear, nn.Linear) for m in tuned.modules() if isinstance(m, nn.Linear))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tuned.modules())


@pytest.mark.parametrize("kind", ["blocks", "windows", "model"])
def test_a_killed_run_resumes_with_the_same_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = recipe(*KINDS[kind])
    whole = run(llama(), how)
    fitted: list[str] = []
    tune = Reconstruction.tune

    def dies(self: Reconstruction, unit: Unit, *rest: Any) -> dict[str, Fitted]:
        if len(fitted) == (0 if kind == "model" else len(how.units.units(llama(), BLOCKS, SITES)) // 2):
            raise KeyboardInterrupt
        fitted.append(unit.name)
        return tune(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "tune", dies)
        with pytest.raises(KeyboardInterrupt):
            run(llama(), how, run_dir=tmp_path)
    kept = {p.stem for p in tmp_path.glob("*.safetensors")}
    assert kept
    assert same(run(llama(), how, run_dir=tmp_path), whole)
    begun = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert same(run(llama(), how, run_dir=tmp_path), whole)  # all of it from the files
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")} == begun


BLOCKS = [f"model.layers.{i}" for i in range(3)]
SITES = [Site(f"{b}.mlp.{leaf}_proj", "linear", (96, 64), b) for b in BLOCKS for leaf in ("gate", "up")]


def test_windows_overlap_and_cover_every_block() -> None:
    model = llama()
    for size, stride, expected in [(2, 1, ["0..1", "1..2"]), (2, 2, ["0..1", "2..2"]), (5, 1, ["0..2"]), (1, 1, "012")]:
        names = [u.name for u in WindowUnits(size, stride).units(model, BLOCKS, SITES)]
        assert names == [f"model.layers.{e if '..' in e else f'{e}..{e}'}" for e in expected]
    with pytest.raises(ConfigError, match="stride"):
        WindowUnits(2, 3)


def test_vision_and_transposed_weights_too() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    make = lambda: AutoModelForImageClassification.from_config(ViTConfig(image_size=16, patch_size=4, **shape)).eval()  # noqa: E731
    vit = make()
    plain, tuned = make(), make()
    for model in (plain, tuned):
        model.load_state_dict(vit.state_dict())
    run(plain, replace(recipe(), tuner=None), data=images())
    run(tuned, recipe(loss=FisherMse()), data=images())
    assert error(tuned, images(), vit) < error(plain, images(), vit)

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    original = AutoModelForCausalLM.from_config(config).eval()
    plain, tuned = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    for model in (plain, tuned):
        model.load_state_dict(original.state_dict())
    run(plain, replace(recipe(), tuner=None))
    run(tuned, recipe())
    assert error(tuned, ids(), original) < error(plain, ids(), original)


def test_a_unit_may_bring_its_own_calls() -> None:
    """Sites across the model, fitted against what an adapter over them computes for calls of its own."""

    class Gates(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList([model.get_submodule(s.name) for s in SITES])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([part(x) for part in self.parts])

    @dataclass(frozen=True)
    class Own:
        def units(
            self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Any] = ()
        ) -> list[Unit]:
            calls = tuple(((torch.randn(4, 64, generator=torch.Generator().manual_seed(i)),), {}) for i in range(3))
            return [Unit("gates", Gates(model), {s.name: model.get_submodule(s.name) for s in SITES}, calls)]

    before, after = run(llama(), replace(recipe(), tuner=None)), run(llama(), recipe(Own()))
    moved = {n.rpartition(".")[0] for n in after if n.endswith("qweight") and not after[n].equal(before[n])}
    assert moved == {s.name for s in SITES}


def test_a_block_with_experts_is_one_unit_and_a_layer_of_it_is_refused() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    moe = AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, **shape)
    ).eval()
    state = {k: v.clone() for k, v in moe.state_dict().items()}
    run(moe, recipe())
    assert sum(isinstance(m, QuantLinear) for m in moe.modules()) == 4 + 8
    again = AutoModelForCausalLM.from_config(moe.config).eval()
    again.load_state_dict(state)
    with pytest.raises(UnsupportedModel, match=r"other tokens|every calibration batch"):
        run(again, recipe(LayerUnits()))


@pytest.mark.parametrize("skip", [(), ("model.layers.0.*",)], ids=["every block", "all but the first"])
def test_the_cache_holds_both_paths(skip: tuple[str, ...]) -> None:
    """The second block's quantized input carries the first's error, and the target is the float block's output."""
    model, caught = llama(), {}
    examples = Surroundings.examples

    def watched(self: Surroundings, unit: Unit, loss: UnitLoss, seed: int) -> list[Example]:
        caught[unit.name] = examples(self, unit, loss, seed)
        return caught[unit.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Surroundings, "examples", watched)
        run(model, recipe(), skip=skip)
    original = llama()
    with torch.no_grad():
        for i, batch in enumerate(ids()):
            states = original.model(**batch, output_hidden_states=True).hidden_states
            quantized = model.model(**batch, output_hidden_states=True).hidden_states
            example = caught["model.layers.1"][i]
            assert example.fp_call[0][0].equal(states[1])
            assert example.target.equal(states[2])
            assert torch.allclose(example.call[0][0], quantized[1], atol=1e-5)
            assert torch.allclose(example.call[0][0], states[1], atol=1e-3) is bool(skip)


def test_two_streams_pass_a_block_that_is_kept() -> None:
    """GPTAQ after a block in full precision: both streams are the same there, so it is GPTQ."""
    one, other = llama(), llama()
    keep = ("model.layers.0.*", "model.layers.2.*", "lm_head")
    run(one, QuantConfig("gptaq", bits=3, group_size=32).quantizer(), skip=keep)
    run(other, QuantConfig("gptq", bits=3, group_size=32).quantizer(), skip=keep)
    name = "model.layers.1.self_attn.q_proj.qweight"  # the first that is reached: nothing before it was rounded
    assert one.state_dict()[name].equal(other.state_dict()[name])


@pytest.mark.parametrize("kind", ["blocks", "model"])
def test_a_budget_chooses_the_bits_and_the_tuner_fits_them(kind: str) -> None:
    """The units planned before the choice are fitted after it, in the chosen widths and within the budget."""
    chosen = QuantConfig("rtn", group_size=32, budget="4 bits").quantizer()
    assert isinstance(chosen, Recipe)
    how = replace(recipe(*KINDS[kind]), allocator=chosen.allocator)
    solved, tuned = llama(), llama()
    before, after = run(solved, replace(how, tuner=None)), run(tuned, how)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    moved = {n.split(".")[2] for n in after if n.endswith("qweight") and not after[n].equal(before[n])}
    assert moved == {"0", "1", "2"}
    grids = {m.layer.weights.grid for m in tuned.modules() if isinstance(m, QuantLinear)}
    assert len(grids) > 1
    assert all(isinstance(grid, IntGrid) for grid in grids)
    assert true_bits(tuned) == true_bits(solved) <= 4
    assert error(tuned, ids(), llama()) < error(solved, ids(), llama())


class Nothing:
    """Finds no unit."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Any] = ()
    ) -> list[Unit]:
        return []


def test_what_cannot_be_fitted_is_refused_before_work_begins() -> None:
    static = act_spec(8, static=True)
    codebook = replace(int_spec(3, 32), zero="float")
    refused = {
        "integer zero points": recipe(weights=codebook, format=None),
        "finds nothing": recipe(Nothing()),
        "transform": replace(recipe(ModelUnit(), Kl()), transforms=awq().transforms),
        "units of blocks": recipe(ModelUnit(), FisherMse()),
        "one scale for the whole": recipe(inputs=replace(static, block=(1, -1))),
    }
    for match, how in refused.items():
        model = llama()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UnsupportedSpec, match=match):
            run(model, how)
        assert same(before, dict(model.state_dict()))
    with pytest.raises(UnsupportedSpec, match="override"):
        run(llama(), recipe(), overrides={"*up_proj": recipe(ModelUnit(), Kl())})
    with pytest.raises(ConfigError, match="steps"):
        Reconstruction(ROUNDING, steps=-1)
    with pytest.raises(ConfigError, match="share"):
        Reconstruction(ROUNDING, share=1.5)


def test_an_override_may_go_without_the_tuner() -> None:
    how = recipe()
    plain, mixed = run(llama(), gptq(3, 32)), run(llama(), how, overrides={"*mlp*": gptq(3, 32), "*o_proj": None})
    name = "model.layers.0.mlp.up_proj.qweight"
    assert mixed[name].shape == plain[name].shape
    assert "model.layers.0.self_attn.o_proj.weight" in mixed
    assert not mixed["model.layers.0.self_attn.q_proj.qweight"].equal(
        run(llama(), replace(how, tuner=None))["model.layers.0.self_attn.q_proj.qweight"]
    )


def test_a_chain_computes_what_its_parts_do() -> None:
    parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
    x = torch.randn(3, 4)
    assert Chain(parts)(((x,), {}), ((), {})).equal(parts[1](parts[0](x)))
