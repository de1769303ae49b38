"""What methods owe the weights of a trained diffusion model: each has one of the two codes beside it, or the nearer."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import backbone
from hf_quant.runtime.linear import QuantLinear
from hf_quant.stages.fakequant import bounds, steps_of

LEARNED: dict[str, dict[str, Any]] = {
    "adaround": {"bits": 3, "group_size": 64, "steps": 10},
    "brecq": {"bits": 3, "group_size": 64, "steps": 10},
    "qdrop": {"bits": 4, "act_bits": 4, "steps": 10},
    "q-diffusion": {"iterations": 10},
    "tfmq-dm": {"iterations": 10},
}
NEAREST: dict[str, dict[str, Any]] = {
    "ptq4dm": {"bits": 4},
    "tdq": {"bits": 4, "iterations": 10},
    "svdquant": {"steps": 0},  # smoothing, where it is folded into the layer before, changes weights
}


@torch.no_grad()
def away(layer: QuantLinear, weight: Tensor) -> Tensor:
    """How far each code is from its weight, in steps: from what the branch leaves, inside the clipped range."""
    W_NK = weight.float().flatten(1)
    if (low := layer.low_rank(torch.float32)) is not None:
        W_NK = W_NK - low[1] @ low[0]
    q = layer.qtensor()
    return (steps_of(W_NK, q).clamp(*bounds(q.spec)) - q.spec.grid.decode(q.codes)).abs()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
@pytest.mark.parametrize("method", [*LEARNED, *NEAREST])
def test_inv_codes_are_beside_their_weights(method: str, name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = diffusion_judges(name)
    pipeline, learned = judge.pipeline(), method in LEARNED
    weights = {n: w.detach().clone() for n, w in backbone(pipeline).named_parameters()}
    config = QuantConfig(method, **{**LEARNED, **NEAREST}[method])
    hf_quant.quantize(backbone(pipeline), config, data=judge.data(0), progress=False)
    layers = {n: m for n, m in backbone(pipeline).named_modules() if isinstance(m, QuantLinear)}
    found = [away(m, weights[n.removesuffix(".matrix") + ".weight"]) for n, m in layers.items()]
    farthest = max(float(a.max()) for a in found)
    turned = sum(int((a > 0.501).sum()) for a in found) / sum(a.numel() for a in found)
    which = "one of the two beside it" if learned else "the nearest"
    claims.invariant(
        method,
        f"the code of every weight, less what a branch holds, is {which}, {name}",
        farthest < (1 if learned else 0.5) + 1e-3 and (turned > 0) == learned,
        {"farthest": farthest, "not the nearest": turned},
    )
