"""A budget together with what else a recipe may have: rotations, transforms, tuners, trainers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.allocation.allocate_test import IDS, llama, run, widths
from hf_quant.errors import UnsupportedSpec
from hf_quant.formats import Layer
from hf_quant.ledger import count_bits
from hf_quant.plan import make_plan
from hf_quant.recipe import Job
from hf_quant.spec import int_spec


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("quarot", {}),
        ("spinquant", {"steps": 2}),
        ("awq", {}),
        ("adaround", {"steps": 4}),
        ("lr-qat", {"steps": 2, "block_steps": 2, "rank": 4}),
    ],
)
def test_the_budget_is_kept(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    """What rewrites, tunes or trains gets the layers that were chosen: their bytes are the plan's, on disk too."""
    model = llama()
    report = run(model, {"size": "4.6 bits", "widths": [3, 4, 8]}, method, **more)
    assert 4.3 < report.bits_per_weight <= 4.6
    assert hf_quant.true_bits(model) == pytest.approx(report.bits_per_weight)
    assert len(set(widths(report).values())) > 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded(IDS).logits.equal(model(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_foresee_the_table_that_a_rotation_unties(tied: bool) -> None:
    found = hf_quant.estimate(llama(tied=tied), QuantConfig("quarot", group_size=16, budget="1 GB"))
    size = found["lowest"]["model_bytes"] + 5000
    model = llama(tied=tied)
    run(model, f"{size} bytes", "quarot")
    assert size - 1500 < count_bits(model).bytes <= size
    model = llama(tied=tied)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UnsupportedSpec, match="cannot be met"):
        run(model, f"{found['lowest']['model_bytes'] - 8} bytes", "quarot")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@dataclass(frozen=True)
class UpToFour:
    """A trainer that takes four bits at most."""

    epochs: int = 1

    def refuses(self, model: nn.Module, layer: Layer) -> str | None:
        return "at most four bits" if getattr(layer.weights.grid, "bits", 0) > 4 else None


def test_a_trainer_is_asked_for_every_width() -> None:
    """What it refuses is not chosen; where it refuses all of them, the plan says so."""
    recipe = QuantConfig("mixed", bits=3, group_size=16).quantizer()
    trained = replace(recipe, trainer=UpToFour())
    plan = make_plan(llama(), trained, Job(data=IDS))
    assert {o.recipe.weights.grid.bits for p in plan.sites.values() for o in p.options} == {2, 3, 4}
    assert {o.recipe.weights.grid.bits for p in make_plan(llama(), recipe, Job()).sites.values() for o in p.options} > {
        4
    }
    wide = replace(recipe.allocator, choices=(int_spec(8, 16),))
    with pytest.raises(UnsupportedSpec, match="none of the widths to choose from: UpToFour: at most four bits"):
        make_plan(llama(), replace(trained, allocator=wide), Job(data=IDS))


def test_widths_above_the_methods_own_are_refused() -> None:
    recipe = QuantConfig("mixed", bits=3, group_size=16).quantizer()
    wide = replace(recipe.allocator, choices=(int_spec(4, 16), int_spec(8, 16)))
    with pytest.raises(UnsupportedSpec, match=r"as small as the method's own bits.*raise bits"):
        make_plan(llama(), replace(recipe, allocator=wide), Job())
