"""Q-Diffusion: split shortcuts compute the same, groups end where the halves meet; whether pictures profit."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_quant import QuantConfig
from hf_quant import quantize as quantize_model
from hf_quant.diffusion.drawing import backbone
from hf_quant.pipeline import quantize
from hf_quant.plugins.diffusion.q_diffusion import SAMPLE, SplitShortcuts
from hf_quant.qtensor import from_extremes
from hf_quant.recipe import Job, Recipe
from hf_quant.runtime.activation import fake_quantize, pack_input
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec, int_spec

WEIGHTS = int_spec(4, 1)


def _split(x_TK: Tensor, parts_K: Tensor, W_NK: Tensor, weights: Spec, inputs: Spec | None) -> Tensor | None:
    stats: Any = {SAMPLE: {"key": torch.arange(len(x_TK)), "x": x_TK}}
    rewrite = SplitShortcuts().join(parts_K, [W_NK], stats, weights, inputs)
    return None if rewrite is None else rewrite.s_K


def test_the_halves_get_ranges_of_their_own() -> None:
    parts, W_NK = torch.tensor([0, 0, 1]), torch.ones(2, 3)
    x_TK = torch.tensor([[-1.0, 4.0, 0.5], [0.0, -4.0, -0.5]])
    static = act_spec(8, static=True)
    s_K = _split(x_TK, parts, W_NK, WEIGHTS, static)
    assert s_K is not None
    assert s_K.tolist() == [1, 1, 0.125]
    assert _split(x_TK, parts, W_NK, WEIGHTS, act_spec(8)) is None
    assert _split(x_TK, parts, W_NK, WEIGHTS, None) is None
    assert _split(x_TK, parts, W_NK, int_spec(4), static) is None
    assert _split(torch.zeros(2, 3), parts, W_NK, WEIGHTS, static) is None


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_half_pays_more_than_the_other_gains(symmetric: bool) -> None:
    """Halves on either side of zero: at equal magnitudes the one that matters would have 1.6 times the step."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.arange(2).repeat_interleave(8)
    sides = torch.tensor([-4.0, 1.0]).repeat_interleave(8)
    x_TK = torch.rand(128, 16, generator=generator) * sides
    W_NK = torch.randn(4, 16, generator=generator) * torch.tensor([1.0, 0.1]).repeat_interleave(8)
    spec = act_spec(4, static=True, symmetric=symmetric)

    def error(s_K: Tensor) -> float:
        at = x_TK / s_K
        rounded = fake_quantize(
            at, spec, pack_input(*from_extremes(at.amin()[None, None], at.amax()[None, None], spec))
        )
        return float((((rounded - at) * s_K).square().mean(0) * W_NK.square().sum(0)).sum())

    s_K = _split(x_TK, parts, W_NK, WEIGHTS, spec)
    unsplit, equal = error(torch.ones(16)), error(sides.abs() / 4)
    assert error(torch.ones(16) if s_K is None else s_K) <= 1.02 * min(unsplit, equal)
    assert (unsplit < 0.6 * equal) != symmetric  # without a zero point the range is as wide on the other side already


def test_groups_end_where_the_halves_meet(caplog: pytest.LogCaptureFixture) -> None:
    static = act_spec(8, static=True)

    def width(sizes: list[int], group: int, inputs: Spec | None = static) -> int:
        parts_K = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        spec = SplitShortcuts().weights(parts_K, int_spec(4, group), inputs)
        s_K = _split((parts_K + 1.0)[None], parts_K, torch.ones(1, len(parts_K)), spec, inputs)
        assert (s_K is not None) == (inputs is static and not caplog.records)
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
@pytest.mark.parametrize(("name", "layers"), [("digits-unet", 12), ("digits-dit", 6)])
def test_inv_split_equals_unsplit_in_full_precision(name: str, layers: int, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """The network after the rewrite, its inputs not rounded; a transformer joins sines and cosines of the timestep."""
    judge = diffusion_judges(name)
    model = judge.model()
    recipe = QuantConfig("q-diffusion", bits=8, group_size=32, split=True).quantizer()  # no group is in both halves
    assert isinstance(recipe, Recipe)
    fine = replace(recipe, inputs=None, tuner=None, transforms=(_Always(),))
    calls, _, _ = judge.expected
    quantize(model, fine, Job(data=calls[:2], progress=False))
    scaled = [n for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.pre_scale is not None]
    assert len(scaled) == layers
    plain = judge.model()
    quantize(plain, replace(fine, transforms=()), Job(data=calls[:2], progress=False))
    batch = calls[5]
    apart = float((model(**batch).sample - plain(**batch).sample).norm() / plain(**batch).sample.norm())
    claims.invariant(
        "q-diffusion",
        f"a network with split shortcuts computes what it does without, inputs not rounded, {name}",
        apart < 1e-5,
        {"relative difference": apart},
    )


class _Always(SplitShortcuts):
    """Splits where inputs are not rounded, too; by powers of two, which change no code."""

    def join(self, parts_K: Any, Ws: Any, stats: Any, weights: Any, inputs: Any) -> Any:
        found = SplitShortcuts.join(self, parts_K, Ws, stats, weights, act_spec(8, static=True))
        return found and replace(found, s_K=2 ** found.s_K.log2().round())


@pytest.mark.slow
@pytest.mark.parametrize(("act_bits", "group_size", "reproduced"), [(4, 32, True), (8, 64, False)])
def test_claim_of_the_split(act_bits: int, group_size: int, reproduced: bool, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Groups of 32 lie in one half each, so both sides have the same ones; those of 64 are narrowed to that."""
    judge = diffusion_judges("digits-unet")
    how: dict[str, Any] = {"act_bits": act_bits, "group_size": group_size, "iterations": 0}
    ours, theirs = (
        [judge.trajectory("q-diffusion", seed=seed, split=split, **how) for seed in range(3)] for split in (True, False)
    )
    claims.order(
        "q-diffusion",
        f"error of the pictures below that without split shortcuts, w4a{act_bits}, groups of {group_size}, nearest "
        "rounding, digits-unet",
        ours=ours,
        theirs=theirs,
        reproduced=reproduced,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-unet", "digits-dit"])
def test_claim_of_all_timesteps(name: str, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Against as many inputs of the step in the middle alone."""
    judge = diffusion_judges(name)

    def errors(seed: int, steps: Sequence[int]) -> tuple[float, float]:
        """Of the predicted noise, a mean over the steps, and of the pictures; each call is of another drawing."""
        pipeline = judge.pipeline()
        data = [judge.data(20 * seed + i)[step] for i, step in enumerate(steps)]
        quantize_model(
            backbone(pipeline), QuantConfig("q-diffusion", iterations=100, seed=seed), data=data, progress=False
        )
        ratios, pictures = judge.compare(pipeline)
        return sum(10 ** (-r / 10) for r in ratios) / len(ratios), pictures

    ours, theirs = ([errors(seed, steps) for seed in range(3)] for steps in (range(20), [10] * 20))
    on_dit = name == "digits-dit"  # on the U-Net four pictures do not tell the two apart
    for i, (what, factor, reproduced) in enumerate((("the predicted noise", 0.9, True), ("the pictures", 0.7, on_dit))):
        claims.order(
            "q-diffusion",
            f"error of {what} at most {factor} of that after calibration on the middle step alone, w4a8, {name}",
            ours=[e[i] for e in ours],
            theirs=[e[i] for e in theirs],
            factor=factor,
            reproduced=reproduced,
        )
