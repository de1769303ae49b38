"""Q-Diffusion: split shortcuts compute the same, and calibration at every timestep beats a single one."""

from dataclasses import replace
from typing import Any

import torch

from hf_quant import QuantConfig
from hf_quant.pipeline import quantize
from hf_quant.plugins.diffusion.q_diffusion import SplitShortcuts
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import act_spec, int_spec
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


@torch.no_grad()
def test_inv_split_equals_unsplit_in_full_precision(diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """The network after the rewrite, its layers' weights and inputs not rounded."""
    judge = diffusion_judges("digits-unet")
    model = judge.model()
    recipe = QuantConfig("q-diffusion", bits=8, group_size=32).quantizer()  # no group is in both halves
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
