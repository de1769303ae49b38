"""Input ranges by timestep: calibrated, packed, saved, loaded, and read by the value of the timestep."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

import hf_quant
from hf_quant.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedModel, UnsupportedSpec
from hf_quant.pipeline import quantize
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.reconstruction import Reconstruction

STEPS = (100, 300, 500, 900)
RECIPE = Recipe(
    weights=int_spec(8), inputs=replace(act_spec(8, static=True, symmetric=False), index="timestep", entries=4)
)


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ).eval()


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def batches(model: nn.Module, steps: tuple[int, ...] = STEPS) -> list[dict[str, torch.Tensor]]:
    """A sample's size grows with its timestep, so that ranges differ."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for t in steps:
        if isinstance(model, UNet2DModel):
            made.append({"sample": torch.randn(2, 1, 8, 8, generator=generator) * t / 100})
        else:
            x = torch.randn(2, 4, 8, 8, generator=generator) * t / 100
            made.append({"hidden_states": x, "class_labels": torch.tensor([1, 3])})
        made[-1]["timestep"] = torch.tensor([t, t])
    return made


def job(model: nn.Module, **fields: Any) -> Job:
    return Job(data=batches(model), progress=False, **fields)


@torch.no_grad()
def out(model: nn.Module, batch: dict[str, torch.Tensor], **other: Any) -> torch.Tensor:
    given = {k: v for k, v in {**batch, **other}.items() if not k.startswith("@")}
    answer: torch.Tensor = model(**given).sample
    return answer


def tables(model: nn.Module) -> list[QuantLinear]:
    return [m for m in model.modules() if isinstance(m, QuantLinear)]


@pytest.mark.parametrize("make", [dit, unet])
def test_ranges_follow_the_timestep(make: Any) -> None:
    whole, model = make(), make()
    quantize(model, RECIPE, job(model))
    assert tables(model)
    assert any(len(m.input_scale.unique()) == len(STEPS) for m in tables(model))
    for batch in batches(model):
        expected = out(whole, batch)
        assert float((out(model, batch) - expected).norm() / expected.norm()) < 0.05
    batch = batches(model)[0]
    wrong = copy.deepcopy(model)
    for layer in tables(wrong):
        assert layer.clock is not tables(model)[0].clock
        layer.input_scale.data = layer.input_scale.flip(0)
        layer.input_zero_point.data = layer.input_zero_point.flip(0)
    assert not torch.equal(out(wrong, batch), out(model, batch))


@pytest.mark.parametrize("make", [dit, unet])
def test_values_between_steps_scalars_and_mixed_batches(make: Any) -> None:
    model = make()
    quantize(model, RECIPE, job(model))
    first, last = batches(model)[0], batches(model)[-1]
    name = next(iter(first))
    mixed = {k: torch.stack([first[k][0], last[k][1]]) for k in first}
    together = out(model, mixed)
    alone = [out(model, {k: v[i : i + 1] for k, v in mixed.items()}) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)  # sums of other lengths
    if isinstance(model, UNet2DModel):
        assert torch.equal(out(model, first, timestep=torch.tensor(100)), out(model, first))
        assert torch.equal(model(first[name], 100).sample, out(model, first))
    clock = tables(model)[0].clock
    assert clock is not None
    assert clock.nearest(torch.tensor([-5.0, 180, 650, 800, 5000])).tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("make", [dit, unet])
def test_save_load_dequantize(make: Any, tmp_path: Path) -> None:
    from hf_quant.config import QuantConfig
    from hf_quant.integrations.finish import finish, quantizer_of

    model = make()
    report = quantize(model, RECIPE, job(model))
    finish(model, quantizer_of(model, QuantConfig("int8-default")), report)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert len({id(m.clock) for m in tables(again)}) == 1
    for batch in batches(model, (100, 450, 900)):
        assert torch.equal(out(again, batch), out(model, batch))
    hf_quant.dequantize(again)
    assert not tables(again)
    assert not again._forward_pre_hooks


@pytest.mark.parametrize("make", [dit, unet])
def test_a_tuner_fits_weights_and_tables(make: Any, tmp_path: Path) -> None:
    """Static inputs at 4 bits: learned rounding and steps help, each entry's step is its own, and a resumed run agrees.

    The units' own loss, hard, is at most the start's; what is compared here is the whole network.
    """
    inputs = replace(act_spec(4, static=True, symmetric=False), index="timestep", entries=4)
    plain = Recipe(weights=int_spec(4), inputs=inputs)
    tuned = replace(plain, tuner=Reconstruction(AdaRound(), steps=40, input_lr=2e-2))
    whole, rounded, fitted, again = make(), make(), make(), make()
    quantize(rounded, plain, job(rounded))
    quantize(fitted, tuned, job(fitted, run_dir=tmp_path))
    quantize(again, tuned, job(again, run_dir=tmp_path))
    errors = [
        sum(float((out(m, b) - out(whole, b)).square().sum()) for b in batches(whole)) for m in (rounded, fitted, again)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] == errors[1]
    before, after = (torch.stack([m.input_scale for m in tables(model)]) for model in (rounded, fitted))
    changes = (after / before)[(after != before).any(1)]
    assert len(changes)
    assert (changes.std(1) > 0).any(), "entries learn apart"


def test_a_run_that_was_killed_resumes_with_the_same_bits(tmp_path: Path) -> None:
    first, second = dit(), dit()
    quantize(first, RECIPE, job(first, run_dir=tmp_path))
    quantize(second, RECIPE, job(second, run_dir=tmp_path))
    assert torch.equal(out(first, batches(first)[1]), out(second, batches(second)[1]))


def test_compiled() -> None:
    model = dit()
    quantize(model, RECIPE, job(model))
    compiled = torch.compile(model, backend="eager")
    for batch in batches(model)[:2]:
        torch.testing.assert_close(out(compiled, batch), out(model, batch))


def test_gradients_pass_straight_through() -> None:
    model = unet()
    quantize(model, RECIPE, job(model))
    batch = batches(model)[0]
    x = batch["sample"].requires_grad_()
    model(x, batch["timestep"]).sample.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


def test_a_missing_timestep_is_an_error() -> None:
    model = dit()
    quantize(model, RECIPE, job(model))
    with pytest.raises(ConfigError, match="pass it `timestep`"):
        model(batches(model)[0]["hidden_states"])
    layer = copy.deepcopy(tables(model)[0])
    assert layer.clock is not None
    layer.clock.entry_B = None
    with pytest.raises(ConfigError, match="outside its network"):
        layer(torch.zeros(1, layer.in_features))


def test_refusals() -> None:
    model = dit()
    with pytest.raises(CalibrationError, match="2 timesteps, too few for 4"):
        quantize(model, RECIPE, Job(data=batches(model, (1, 2)), progress=False))
    with pytest.raises(UnsupportedModel, match="takes no `timestep`"):
        Clock([1]).watch(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="ascending"):
        Clock([2, 1])
    override = replace(RECIPE, inputs=replace(RECIPE.inputs, entries=3))  # type: ignore[type-var]
    with pytest.raises(UnsupportedSpec, match="one size"):
        quantize(model, RECIPE, job(model, overrides={"*attn1.to_q": override}))
    assert not tables(model)


def test_damaged_steps_are_refused(tmp_path: Path) -> None:
    from hf_quant.config import QuantConfig
    from hf_quant.integrations.finish import finish, quantizer_of

    model = dit()
    finish(model, quantizer_of(model, QuantConfig("int8-default")), quantize(model, RECIPE, job(model)))
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert "900.0" in text
    config.write_text(text.replace("900.0", "50.0"))
    with pytest.raises(CheckpointError, match="ascending"):
        DiTTransformer2DModel.from_pretrained(tmp_path)
