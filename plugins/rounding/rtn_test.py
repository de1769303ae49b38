"""Round to nearest on a trained model: no value of a group's grid is nearer, and bits pay."""

import torch

from hf_quant.plugins.rounding.rtn import rtn
from hf_quant.qtensor import expand


def test_every_stored_value_is_the_nearest_of_its_grid(judge, claims) -> None:  # type: ignore[no-untyped-def]
    W = judge.model().model.layers[2].mlp.up_proj.weight.detach()[:64]
    recipe = rtn(bits=3, group_size=48)
    q = recipe.solver.solve(W, recipe.weights, recipe.range, None)
    assert q.zero is not None
    scale, zero = (expand(t, q.spec, q.shape) for t in (q.scale, q.zero))
    grid = (torch.arange(8)[:, None, None] - zero) * scale
    nearest = (grid - W).abs().amin(0)
    gap = float(((q.dequantize() - W).abs() - nearest).abs().max())
    claims.invariant("rtn", "each stored value is the nearest of its group's grid, 3 bits", gap < 1e-7, {"gap": gap})
    assert (nearest <= scale * 0.51).all()


def test_more_bits_and_smaller_groups_are_nearer(judge, claims) -> None:  # type: ignore[no-untyped-def]
    kl = [judge.kl("rtn", bits=b, group_size=g) for b, g in ((8, 64), (4, 64), (3, 64), (2, 64))]
    assert kl == sorted(kl)
    assert kl[0] < 1e-4
    claims.order(
        "rtn",
        "KL in groups of 32 below that in groups of 64, 3 bits, tiny-lm",
        ours=[judge.kl("rtn", bits=3, group_size=32)],
        theirs=[judge.kl("rtn", bits=3, group_size=64)],
    )
