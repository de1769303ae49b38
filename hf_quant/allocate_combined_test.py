"""A budget together with what else a recipe may have: rotations, transforms, tuners."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.allocate_test import IDS, llama, run, widths


@pytest.mark.parametrize(
    ("method", "more"),
    [("quarot", {}), ("spinquant", {"steps": 2}), ("awq", {}), ("adaround", {"steps": 4})],
)
def test_the_budget_is_kept(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    """What rewrites or tunes gets the layers that were chosen: their bytes are the plan's, on disk too."""
    model = llama()
    report = run(model, {"size": "4.6 bits", "widths": [3, 4, 8]}, method, **more)
    assert 4.3 < report.bits_per_weight <= 4.6
    assert hf_quant.true_bits(model) == pytest.approx(report.bits_per_weight)
    assert len(set(widths(report).values())) > 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded(IDS).logits.equal(model(IDS).logits)
