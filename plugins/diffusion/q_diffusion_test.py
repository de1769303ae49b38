"""Q-Diffusion: split shortcuts compute the same, groups end where the halves meet; whether pictures profit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_quant import QuantConfig
from hf_quant.pipeline import quantize
from hf_quant.plugins.diffusion.q_diffusion import SplitShortcuts
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stats import AbsMax

WEIGHTS = int_spec(4, 1)


def test_the_halves_get_one_range() -> None:
    parts = torch.tensor([0, 0, 1])
    stats: Any = {AbsMax(): {"max": torch.tensor([1.0, 4.0, 0.5])}}
    rewrite = SplitShortcuts().join(parts, [], stats, WEIGHTS, act_spec(8, static=True))
    assert rewrite is not None
    assert rewrite.s_K.tolist() == [1, 1, 0.125]
    assert SplitShortcuts().join(parts, [], stats, WEIGHTS, act_spec(8)) is None
    assert SplitShortcuts().join(parts, [], stats, WEIGHTS, None) is None
    assert SplitShortcuts().join(parts, [], stats, int_spec(4), act_spec(8, static=True)) is None
    stats = {AbsMax(): {"max": torch.zeros(3)}}
    assert SplitShortcuts().join(parts, [], stats, WEIGHTS, act_spec(8, static=True)) is None


def test_groups_end_where_the_halves_meet(caplog: pytest.LogCaptureFixture) -> None:
    static = act_spec(8, static=True)

    def width(sizes: list[int], group: int, inputs: Spec | None = static) -> int:
        parts_K = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        spec = SplitShortcuts().weights(parts_K, int_spec(4, group), inputs)
        rewrite = SplitShortcuts().join(parts_K, [], {AbsMax(): {"max": parts_K + 1.0}}, spec, inputs)
        assert (rewrite is not None) == (inputs is static and not caplog.records)
        return spec.block_size((1, len(parts_K)))[1]

    assert width([288, 576], 64) == 32
    assert width([576, 288], 64) == 64
    assert width([576, 288], -1) == 288
    assert width([576, 576], 64) == 64
    assert width([576, 576], -1) == 576
    assert width([288, 576], 64, None) == 64
    assert width([70, 3], 64) == 64
    assert "not split" in caplog.text


@torch.no_grad()
def test_inv_split_equals_unsplit_in_full_precision(diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """The network after the rewrite, its layers' weights and inputs not rounded."""
    judge = diffusion_judges("digits-unet")
    model = judge.model()
    recipe = QuantConfig("q-diffusion", bits=8, group_size=32, split=True).quantizer()  # no group is in both halves
    assert isinstance(recipe, Recipe)
    fine = replace(recipe, inputs=None, tuner=None, transforms=(_Always(),))
    calls, _, _ = judge.expected
    quantize(model, fine, Job(data=calls[:2], progress=False))
    scaled = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.pre_scale is not None]
    assert len(scaled) == 12
    plain = judge.model()
    quantize(plain, replace(fine, transforms=()), Job(data=calls[:2], progress=False))
    batch = calls[5]
    apart = float((model(**batch).sample - plain(**batch).sample).norm() / plain(**batch).sample.norm())
    claims.invariant(
        "q-diffusion",
        "a network with split shortcuts computes what it does without, inputs not rounded, digits-unet",
        apart < 1e-5,
        {"relative difference": apart},
    )


class _Always(SplitShortcuts):
    """Splits where inputs are not rounded, too; by powers of two, which change no code."""

    def join(self, parts_K: Any, Ws: Any, stats: Any, weights: Any, inputs: Any) -> Any:
        found = SplitShortcuts.join(self, parts_K, Ws, stats, weights, act_spec(8, static=True))
        return found and replace(found, s_K=2 ** found.s_K.log2().round())


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [-1, 64])
def test_claim_of_the_split(group_size: int, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = diffusion_judges("digits-unet")
    how: dict[str, Any] = {"group_size": group_size, "iterations": 100}
    ours, theirs = (
        [judge.trajectory("q-diffusion", seed=seed, split=split, **how) for seed in range(3)] for split in (True, False)
    )
    groups = "one scale a channel" if group_size == -1 else f"groups of {group_size}"
    claims.order(
        "q-diffusion",
        f"error of the pictures below that without split shortcuts, w4a8, {groups}, digits-unet",
        ours=ours,
        theirs=theirs,
        reproduced=False,  # on three seeds 3.41 times as far off with one scale a channel, 3.28 with groups of 64
    )
