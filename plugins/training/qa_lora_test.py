"""QA-LoRA on a trained model: what is merged is what was trained."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_quant
from hf_quant import QuantConfig
from hf_quant.plugins.training.lr_qat_test import SHORT
from hf_quant.plugins.training.qa_lora import qa_lora
from hf_quant.recipe import Job
from hf_quant.testing import Claims

SETTING = {"bits": 3, "group_size": 32}


def test_invariant_codes_and_scales_are_frozen(judge, claims: Claims) -> None:
    data = judge.data(0)[:4]
    models = [judge.model(), judge.model()]
    hf_quant.quantize(models[0], QuantConfig("qa-lora", **SETTING, steps=3), data=data, progress=False)
    replace(qa_lora(**SETTING), trainer=None).quantize(models[1], Job(data=data, progress=False))
    pairs = list(zip(*(hf_quant.checkpoint.packed_modules(m) for m in models), strict=True))
    frozen = all(torch.equal(a.qweight, b.qweight) and torch.equal(a.scale, b.scale) for (_, a), (_, b) in pairs)
    moved = all(not torch.equal(a.zero_point, b.zero_point) for (_, a), (_, b) in pairs)
    claims.invariant("qa-lora", "training changes zero points and nothing else", frozen and moved)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
@torch.no_grad()
def test_invariant_an_adapter_of_peft_merges_exactly(judge, claims: Claims) -> None:
    model = judge.model()
    recipe = replace(qa_lora(**SETTING), trainer=None)
    recipe.quantize(model, Job(data=judge.data(0)[:4], progress=False))
    config = LoraConfig(
        r=4, target_modules="all-linear", use_qalora=True, qalora_group_size=32, init_lora_weights=False
    )
    tuned = get_peft_model(model, config).eval()
    want = tuned(judge.test[:1]).logits
    with tuned.disable_adapter():
        away = float((tuned(judge.test[:1]).logits - want).abs().max())
    merged = hf_quant.merge_adapter(tuned)
    off = float((tuned(judge.test[:1]).logits - want).abs().max())
    exact = all(m.how == "zero points" for m in merged) and max(m.lost for m in merged) < 1e-8 and off < 1e-3 * away
    claims.invariant("qa-lora", "a merged adapter computes the same", exact, {"logits moved": away, "off": off})


@pytest.mark.slow
def test_order_below_where_it_began(judge, claims: Claims) -> None:
    ours = [judge.kl("qa-lora", seed=s, **SETTING, **SHORT) for s in range(2)]
    theirs = []
    for seed in range(2):
        model = judge.model()
        replace(qa_lora(**SETTING), trainer=None).quantize(model, Job(data=judge.data(seed), progress=False))
        theirs.append(judge.distance(model)[0])
    claims.order(
        "qa-lora", "KL below that of the codes it began with, 20 steps, 3 bits (tiny-lm)", ours=ours, theirs=theirs
    )
