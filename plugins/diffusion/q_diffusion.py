"""Q-Diffusion: post-training quantization of diffusion models (arXiv:2302.04304).

    calibration: as many x_t from every step of the model's own denoising, with and without its condition
    rounding:    min over V  E ||block_q(x_t, t) - block(x_t, t)||^2 + AdaRound's penalty, block after block
    shortcuts:   [h, skip] W^T = h W_1^T + skip W_2^T,  each half rounded with a step of its own, s_1 and s_2

Shapes: W_NK weight, scale and zero `[N, K / group_size]`; `parts_K` numbers the tensor that an input channel came from.
The second half's step is `s_2 = s_1 / m`: its channels are multiplied by m while the model runs (`pre_scale` `[K]`) and
its columns are divided by m before they are rounded. Of `m_p = (largest peak / peak of p)^a`, a in 0 ... 1, that is
taken which makes the least of `sum_p ||W_p||^2 (s / m_p)^2`, the error of the product if rounding errors are uniform;
s is the step of the range that all then share. a = 0 leaves the input as it is.
Differs from the paper: shortcuts are split on request alone. At 4-bit inputs splitting helps; at 8 bits the error is
that of the weights and nothing is won. Where a group of columns would lie in both halves, groups are as wide as the
widest that divides both (`group_size=-1`: the halves themselves, if equal): other codes, which need not be better
ones. Weights have a scale for every `group_size` columns and a zero point, finer than one for each half; both halves
share the code of zero; ranges of inputs are searched, then learned with the rounding; see `adaround` for the rounding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.calibration.sampled_range import SampledRange
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.qtensor import from_extremes
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.trajectories import Trajectories
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import Rows, Stat, Stats

LEAST = 1e-3  # of the larger half's peak: an empty half has none
CANDIDATES = 21
SAMPLE = Rows(128)
NARROWEST = 8  # columns that a scale is worth having for

_log = logging.getLogger("hf_quant")


@dataclass(frozen=True, slots=True)
class SplitShortcuts:
    """The parts of a concatenation are brought to like magnitudes, as far as that makes the product's error less."""

    needs: ClassVar[tuple[Stat, ...]] = (SAMPLE,)

    def weights(self, parts_K: Tensor, weights: Spec, inputs: Spec | None) -> Spec:
        """See `JoinTransform.weights`."""
        group = weights.block_size((1, len(parts_K)))[1]
        if not _straddles(parts_K, group) or not _stored(inputs):
            return weights
        sizes = parts_K.unique_consecutive(return_counts=True)[1].tolist()
        narrow = gcd(*sizes) if group >= len(parts_K) else gcd(group, *sizes)
        if narrow < NARROWEST:
            _log.warning("a shortcut is not split: no group of %d columns or more fits parts of %s", NARROWEST, sizes)
            return weights
        return replace(weights, block=(weights.block[0], narrow))

    def join(
        self, parts_K: Tensor, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None
    ) -> Diagonal | None:
        """See `JoinTransform.join`; None as well where weights of both halves share a scale."""
        straddles = _straddles(parts_K, weights.block_size((1, len(parts_K)))[1])
        if inputs is None or not _stored(inputs) or straddles:
            return None
        x_TK = SAMPLE.values(stats[SAMPLE])
        parts_K = parts_K.to(x_TK.device)
        of_P = [parts_K == part for part in parts_K.unique()]
        low_P = torch.stack([x_TK[:, of].amin() for of in of_P]).clamp_max(0)
        high_P = torch.stack([x_TK[:, of].amax() for of in of_P]).clamp_min(0)
        energy_P = torch.stack([torch.cat([W[:, of] for W in Ws]).square().sum() for of in of_P])
        m_P = least_error(low_P, high_P, energy_P, inputs)
        return None if m_P is None else Diagonal(1 / m_P[parts_K])


def least_error(low_P: Tensor, high_P: Tensor, energy_P: Tensor, inputs: Spec) -> Tensor | None:
    """What each part is multiplied by (see the module); None where nothing is better than 1.

    Args:
        low_P: smallest value of each part, or 0.
        high_P: largest, or 0.
        energy_P: `||W_p||^2` of the columns that read it.
        inputs: how they are rounded together.
    """
    peak_P = torch.maximum(high_P, -low_P)
    if not bool(peak_P.max() > 0):
        return None
    ratio_P = 1 / (peak_P / peak_P.max()).clamp_min(LEAST)
    tried = [ratio_P**a for a in torch.linspace(0, 1, CANDIDATES).tolist()]
    steps = [from_extremes((low_P * m).amin()[None, None], (high_P * m).amax()[None, None], inputs)[0] for m in tried]
    errors = [float((energy_P * (step / m).square()).sum()) for step, m in zip(steps, tried, strict=True)]
    best = min(range(CANDIDATES), key=errors.__getitem__)
    return tried[best] if best else None


def _stored(inputs: Spec | None) -> bool:
    """Whether there is a step that all tokens, and so both halves of each, would share."""
    return inputs is not None and inputs.range != "dynamic"


def _straddles(parts_K: Tensor, group: int) -> bool:
    return any(len(part.unique()) > 1 for part in parts_K.split(group))


@method(
    "q-diffusion",
    paper=Paper("2302.04304", "Q-Diffusion: Quantizing Diffusion Models"),
    domains={"diffusion"},
    claim="split shortcuts change nothing before rounding; no block ends worse on its calibration data than it began",
)
def q_diffusion(
    bits: int = 4,
    act_bits: int = 8,
    group_size: int = 64,
    calibration_steps: int = 20,
    samples: int = 128,
    iterations: int = 1000,
    split: bool = False,
    input_lr: float = 1e-3,
    clip_steps: int = 24,
) -> Recipe:
    """Trajectories at every step, split shortcuts if asked; rounding and input ranges learned block after block."""
    return Recipe(
        weights=int_spec(bits, group_size),
        inputs=act_spec(act_bits, static=True, symmetric=False),
        sampler=Trajectories(steps=calibration_steps, samples=samples, batch_size=8),
        transforms=(SplitShortcuts(),) if split else (),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        input_range=SampledRange(MseClip(steps=clip_steps, floor=0.3, power=2.0)),
        tuner=Reconstruction(AdaRound(), steps=iterations, input_lr=input_lr),
    )
