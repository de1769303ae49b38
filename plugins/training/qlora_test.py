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


def test_it_may_begin_at_loftq(judge) -> None:
    """Codes and branch are those of `loftq` over the same ranges, before any step to the bit."""
    from hf_quant.plugins.calibration.mse_clip import MseClip
    from hf_quant.plugins.residual.loftq import Loftq
    from hf_quant.plugins.residual.lowrank_core import low_rank
    from hf_quant.plugins.training.qlora import Qlora
    from hf_quant.spec import int_spec

    g = torch.Generator().manual_seed(0)
    W = torch.randn(48, 64, generator=g)
    q = Loftq(4).solve(W, int_spec(2, 32), MseClip(), None)
    fake = Qlora(rank=4, init="loftq").start(W, q, g)
    down, up = low_rank(W - q.dequantize(), 4)
    assert torch.allclose(fake(W), q.dequantize() + up @ down, atol=1e-6)
    assert (fake(W) - W).norm() < 0.9 * (q.dequantize() - W).norm()
    recipe = QuantConfig("qlora", **SETTING, init="loftq", rank=4).quantizer()
    assert (recipe.solver, recipe.trainer.rounding.init) == (Loftq(4), "loftq")


@pytest.mark.slow
def test_order_below_where_it_began(judge, claims) -> None:
    ours = [judge.kl("qlora", seed=s, **SETTING, **SHORT) for s in range(2)]
    theirs = [judge.kl("mse-clip", power=2.0, floor=0.5, steps=24, **SETTING)] * 2
    claims.order("qlora", "KL below that of its codes alone, 20 steps, 3 bits (tiny-lm)", ours=ours, theirs=theirs)
