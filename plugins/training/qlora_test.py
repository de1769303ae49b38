"""QLoRA as a method: frozen codes, a branch that is trained, saved and counted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.plugins.training.lr_qat_test import SETTING, SHORT


def test_invariant_codes_are_frozen(judge, claims, tmp_path) -> None:
    given = {**SETTING, "steps": 3, "batch_size": 2}
    model, plain = judge.model(), judge.model()
    report = hf_quant.quantize(model, QuantConfig("qlora", **given), data=judge.data(0)[:4], progress=False)
    hf_quant.quantize(plain, QuantConfig("mse-clip", **SETTING, power=2.0, floor=0.5, steps=24), progress=False)
    pairs = zip(hf_quant.checkpoint.packed_modules(model), hf_quant.checkpoint.packed_modules(plain), strict=True)
    frozen = all(torch.equal(a.qweight, b.qweight) for (_, a), (_, b) in pairs)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        same = torch.equal(loaded(judge.test[:1]).logits, model(judge.test[:1]).logits)
    counted = abs(report.bits_per_weight - hf_quant.true_bits(model)) < 1e-9
    claims.invariant("qlora", "codes are those of before; the branch is saved and counted", frozen and same and counted)


@pytest.mark.slow
def test_order_below_where_it_began(judge, claims) -> None:
    ours = [judge.kl("qlora", seed=s, **SETTING, **SHORT) for s in range(2)]
    theirs = [judge.kl("mse-clip", power=2.0, floor=0.5, steps=24, **SETTING)] * 2
    claims.order("qlora", "KL below that of its codes alone, 20 steps, 3 bits (tiny-lm)", ours=ours, theirs=theirs)
