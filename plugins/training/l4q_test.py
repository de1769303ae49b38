"""L4Q on a trained model: integers alone, and better than an adapter that is merged afterwards."""

import pytest

import hf_quant
from hf_quant import QuantConfig
from hf_quant.plugins.training.lr_qat_test import SETTING, SHORT, from_nearest
from hf_quant.recipe import Job
from hf_quant.runtime.packed import refit


def test_invariant_no_side_branch(judge, claims) -> None:
    model = judge.model()
    recipe = from_nearest("l4q", **SETTING, steps=2, batch_size=1)
    recipe.quantize(model, Job(data=judge.data(0)[:2], progress=False))
    layers = [m for _, m in hf_quant.checkpoint.packed_modules(model)]
    claims.invariant("l4q", "end model is pure integers", all(m.lr_up is None for m in layers))


@pytest.mark.slow
def test_order_below_merging_afterwards(judge, claims) -> None:
    ours, theirs = [], []
    for seed in range(2):
        ours.append(judge.kl("l4q", seed=seed, **SETTING, **SHORT))
        model = judge.model()
        hf_quant.quantize(
            model, QuantConfig("qlora", **SETTING, **SHORT, seed=0), data=judge.data(seed), progress=False
        )
        for _, module in hf_quant.checkpoint.packed_modules(model):
            merged = refit(module.dequantize(), module.layer.weights)
            module.lr_up = module.lr_down = None
            for name, tensor in module.format.pack(merged).items():
                getattr(module, name).data.copy_(tensor)
            module.prepare()
        theirs.append(judge.distance(model)[0])
    claims.order("l4q", "KL below qlora's, merged and rounded, 20 steps, 3 bits (tiny-lm)", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_order_near_lr_qat(judge, claims) -> None:
    ours = [judge.kl("l4q", seed=s, **SETTING, **SHORT) for s in range(2)]
    theirs = [judge.kl("lr-qat", seed=s, rank=16, block_steps=0, **SETTING, **SHORT) for s in range(2)]
    claims.order(
        "l4q", "KL at most 1.03 of lr-qat's, 20 steps, 3 bits (tiny-lm)", ours=ours, theirs=theirs, factor=1.03
    )
