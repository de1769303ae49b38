"""LR-QAT on a trained model: begins at GPTQ, ends below it, and keeps a small optimizer state."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import hf_quant
from hf_quant import QuantConfig
from hf_quant.plugins.training.lsq import Lsq
from hf_quant.recipe import Job, Recipe
from hf_quant.stages.solver import Nearest
from hf_quant.stages.trainer import Qat

SETTING = {"bits": 3, "group_size": 64}
TWO = {"bits": 2, "group_size": 64}
SHORT = {"steps": 20, "batch_size": 4}


def from_nearest(method: str, **given: Any) -> Recipe:
    """The method's training alone: for what does not depend on where that begins."""
    recipe = QuantConfig(method, **given).quantizer()
    assert isinstance(recipe, Recipe)
    return replace(recipe, objective=None, solver=Nearest(), tuner=None)


def test_invariant_nothing_is_left_beside_the_codes(judge, claims, tmp_path) -> None:
    """The trained model saves, loads and computes what was trained; its size is that of rounding to the same grid."""
    from transformers import AutoModelForCausalLM

    model = judge.model()
    config = QuantConfig("lr-qat", **SETTING, block_steps=2, steps=3, batch_size=1)
    report = hf_quant.quantize(model, config, data=judge.data(0)[:4], progress=False)
    plain = judge.model()
    hf_quant.quantize(plain, QuantConfig("rtn", **SETTING), progress=False)
    assert report.training["steps"] == 3
    assert report.training["first_loss"] > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        same = torch.equal(loaded(judge.test[:1]).logits, model(judge.test[:1]).logits)
    moved = any(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    holds = same and moved and hf_quant.true_bits(model) == hf_quant.true_bits(plain)
    told = {"same": float(same), "moved": float(moved)}
    claims.invariant("lr-qat", "merged model is plain integers of rtn's size and loads to the bit", holds, told)


@pytest.mark.slow
def test_a_few_steps_already_help(judge) -> None:
    """From rounding to nearest in the same ranges, at 2 bits, with the default learning rates."""
    begun, model = judge.model(), judge.model()
    replace(from_nearest("lr-qat", **TWO), trainer=None).quantize(begun, Job(data=judge.data(0)[:2], progress=False))
    recipe = from_nearest("lr-qat", **TWO, rank=16, steps=12, batch_size=2)
    recipe.quantize(model, Job(data=judge.data(0), progress=False))
    assert judge.distance(model)[0] < 0.9 * judge.distance(begun)[0]


@pytest.mark.slow
def test_claim(judge, claims) -> None:
    ours, theirs = judge.kls("lr-qat", **TWO, **SHORT), judge.kls("gptq-refined", coherent=4.0, **TWO)
    statement = "KL at most 0.9 of gptq-refined's, after 150 steps of each block and 20 of all, 2 bits (tiny-lm)"
    claims.order("lr-qat", statement, ours=ours, theirs=theirs, factor=0.9)


def test_optimizer_state_is_a_fraction(judge, claims) -> None:
    """Of that of training all weights (LSQ), bytes as the optimizer holds them."""
    bytes_of = {}
    for method, extra in (("lr-qat", {"rank": 4}), ("lsq", {})):
        recipe = from_nearest(method, **SETTING, steps=1, batch_size=1, **extra)
        report = recipe.quantize(judge.model(), Job(data=judge.data(0)[:2], progress=False))
        bytes_of[method] = report.training["optimizer_bytes"]
    ratio = bytes_of["lr-qat"] / bytes_of["lsq"]
    claims.invariant(
        "lr-qat", "optimizer state below a tenth of full training's (rank 4, tiny-lm)", ratio < 0.1, {"ratio": ratio}
    )


def test_an_interrupted_training_goes_on(judge, tmp_path) -> None:
    """The same codes as without the interruption, from the Trainer's own checkpoint."""

    class Cut(Exception):
        pass

    def run(folder, steps_until_cut=None):
        from hf_quant.learning import training

        recipe = from_nearest("lr-qat", **SETTING, steps=10, batch_size=1, rank=4)
        model, before = judge.model(), training._Trainer.compute_loss
        seen = []

        def counted(self, *args, **kwargs):
            seen.append(0)
            if steps_until_cut is not None and len(seen) > steps_until_cut:
                raise Cut
            return before(self, *args, **kwargs)

        training._Trainer.compute_loss = counted
        try:
            recipe.quantize(model, Job(data=judge.data(0)[:4, :64], run_dir=folder, progress=False))
        finally:
            training._Trainer.compute_loss = before
        return model, len(seen)

    whole, steps = run(tmp_path / "whole")
    assert steps == 10
    with pytest.raises(Cut):
        run(tmp_path / "parts", 6)
    resumed, steps = run(tmp_path / "parts")
    assert steps <= 5
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_the_trainer_is_a_value() -> None:
    assert Qat(Lsq()) == Qat(Lsq())
    assert hash(Qat(Lsq())) == hash(Qat(Lsq()))
