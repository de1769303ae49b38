"""TFMQ-DM: every timestep reads its own range; temporal features are kept better than by reconstructing blocks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_quant.diffusion.drawing import backbone
from hf_quant.diffusion.temporal import temporal_block
from hf_quant.diffusion.timesteps_test import STEPS, batches, dit, job, out, tables, unet
from hf_quant.errors import UnsupportedModel
from hf_quant.method import method_named
from hf_quant.pipeline import quantize
from hf_quant.plugins.diffusion.temporal_units import NAME, TemporalUnits
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.sites import find_blocks, walk
from hf_quant.stages.tuner import BlockUnits, Unit
from hf_quant.testing import DiffusionJudge
from hf_quant.testing.bench import diffusion_judge_on


def recipe(**arguments: Any) -> Recipe:
    made = method_named("tfmq-dm").build(**arguments)
    assert isinstance(made, Recipe)
    return made


def layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("make", [dit, unet])
def test_inv_every_timestep_reads_its_own_range(make: Any, claims) -> None:  # type: ignore[no-untyped-def]
    model = make()
    quantize(model, recipe(act_bits=4, ranges=len(STEPS), iterations=4), job(model))
    exact = []
    for layer in tables(model):
        assert layer.clock is not None
        for i, t in enumerate(STEPS):
            layer.clock.entry_B = layer.clock.nearest(torch.tensor([t]))
            exact.append(layer.clock.entry_B.item() == i)
        assert len(layer.input_scale) == len(STEPS)
    layer = next(m for m in tables(model) if m.kind == "linear" and len(m.input_scale.unique()) == len(STEPS))
    x_TK = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)) * layer.input_scale.mean() * 4
    bias = 0 if layer.bias is None else layer.bias
    for i, t in enumerate(STEPS):
        layer.clock.entry_B = layer.clock.nearest(torch.tensor([t]))
        s, z = layer.input_scale[i], layer.input_zero_point[i]
        rounded = ((x_TK / s).round() + z).clamp(0, 15).sub(z) * s
        expected = rounded @ layer.dequantize(torch.float32).T + bias
        torch.testing.assert_close(layer(x_TK), expected, rtol=1e-4, atol=1e-5)
    kind = type(model).__name__
    claims.invariant("tfmq-dm", f"table lookups exact for all timesteps, {kind}", all(exact), {"lookups": len(exact)})


def test_units_share_no_layer() -> None:
    for model in (dit(), unet()):
        blocks, sites = find_blocks(model), list(walk(model))
        planned = TemporalUnits().units(model, blocks, sites)
        units = TemporalUnits().units(model, blocks, sites, batches(model))
        assert [u.name for u in planned if u.calls] == []
        assert units[-1].name == NAME
        assert units[-1].calls is not None
        names = [n for u in units for n in u.sites]
        assert len(names) == len(set(names))


def test_a_model_whose_layers_all_see_the_sample() -> None:
    model = dit()
    blocks = find_blocks(model)
    mixed = [s for s in walk(model) if "attn1" in s.name]
    with pytest.raises(UnsupportedModel, match="timestep alone"):
        TemporalUnits().units(model, blocks, mixed, batches(model))


class FirstBlock:
    """Of the blocks only the first is fitted."""

    def units(self, *given: Any) -> list[Unit]:
        """One."""
        return BlockUnits().units(*given)[:1]


def similarity(judge: DiffusionJudge, how: Recipe, seed: int) -> tuple[float, float]:
    """(1 - cosine of temporal features to full precision's, largest over timesteps; error of the pictures)."""
    data, whole, pipeline = judge.data(seed), judge.model(), judge.pipeline()
    names, quantized = layers(whole), backbone(pipeline)
    quantize(quantized, how, Job(data=data, seed=seed, progress=False))
    features, expected = (temporal_block(m, names, data[0]) for m in (quantized, whole))
    assert features is not None
    assert expected is not None
    clock = next(m.clock for m in quantized.modules() if isinstance(m, QuantLinear) and m.clock is not None)
    away = 0.0
    with torch.no_grad():
        for conditions in expected.conditions(data):
            clock.entry_B = clock.nearest(conditions["timestep"])
            cosine = F.cosine_similarity(features(**conditions).double(), expected(**conditions).double())
            away = max(away, 1 - float(cosine.min()))
    pictures = judge.draw(pipeline, 1000) - judge.expected[2]
    return away, float(pictures.square().mean())


def test_temporal_features_are_kept() -> None:
    """Four steps of the trained transformer: fitting the temporal layers brings their features nearer."""
    judge = diffusion_judge_on("digits-dit")
    judge.steps = 4
    fitted = recipe(ranges=4, iterations=30)
    ours, theirs = (
        similarity(judge, h, 0)[0]
        for h in (replace(fitted, units=TemporalUnits(FirstBlock())), replace(fitted, tuner=None))
    )
    assert ours < 0.9 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
def test_claim(name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = diffusion_judges(name)
    how = recipe(iterations=100)
    ours, theirs = (
        [similarity(judge, replace(how, units=units), seed) for seed in range(3)]
        for units in (TemporalUnits(), BlockUnits())
    )
    for i, what in enumerate(("1 - cosine of temporal features", "error of the pictures")):
        claims.order(
            "tfmq-dm",
            f"{what} at most 0.9 of that after reconstruction of blocks, W4A8, {name}",
            ours=[figures[i] for figures in ours],
            theirs=[figures[i] for figures in theirs],
            factor=0.9,
            reproduced=name == "digits-dit",  # the U-Net's cosine is least where features are smallest, and count least
        )


def test_saved_and_loaded(tmp_path: Any) -> None:
    from hf_quant.config import QuantConfig
    from hf_quant.integrations.finish import finish, quantizer_of

    model = dit()
    report = quantize(model, recipe(ranges=len(STEPS), iterations=4), job(model))
    finish(model, quantizer_of(model, QuantConfig("tfmq-dm")), report)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for batch in batches(model):
        assert torch.equal(out(again, batch), out(model, batch))
