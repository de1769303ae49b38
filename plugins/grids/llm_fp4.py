"""LLM-FP4: small floats for weights and inputs, formats searched, exponents shifted before (arXiv:2310.16836).

    x = (-1)^s 2^(max(e, 1) - b) (m / 2^M + [e > 0]),  b real: the scale is 2^(bias - b);  E + M = bits - 1

Every site tries each split of its bits into exponent and mantissa: weights by the error `tr(E H E^T)` of the output,
with one scale a row; then inputs, one scale in all, by the error `||q(X) Q^T - X W^T||^2` on sampled tokens. Before
that an input channel whose largest value is 2^j times below the largest of all is scaled up by `2^min(j, 2^E - 1)`,
folded into the norm before and the weights' columns: to the tensor's bias it is an integer shift of the exponent.

Shapes: W_NK weight, scale `[N, 1]`; x_TK sampled inputs; s_K the shifts, `2^-j`.
Differs from the paper: scales are searched in `steps` ratios of the largest magnitude, from 0.3 to 1, where the paper
has 100 from 0.01 to 1.2; a weight's by its own error weighed by diag H, an input's by its own error; formats are chosen
in one round, weights first, instead of three; shifts need a norm (or linear layer) before the layer to be folded into.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import FloatGrid, MiniFloatGrid
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.qtensor import nearest
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.range import Range
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import AbsMax, Gram, Rows, Stat, Stats, hessian

SAMPLE = Rows(256)


def splits(bits: int) -> tuple[MiniFloatGrid, ...]:
    """Every split of `bits` into a sign, at least one exponent bit (5 at most) and the mantissa."""
    return tuple(MiniFloatGrid(e, bits - 1 - e) for e in range(1, min(bits - 1, 5) + 1))


@dataclass(frozen=True, slots=True)
class FormatSearch:
    """The split with the least output error, for weights and then for inputs."""

    clip: MseClip
    needs: ClassVar[tuple[Stat, ...]] = (Gram(), SAMPLE)

    def choose(self, W_NK: Tensor, stats: Stats, weights: Spec, inputs: Spec | None) -> tuple[Spec, Spec | None]:
        """See `GridChoice.choose`."""
        H_KK, x_TK = hessian(stats), SAMPLE.values(stats[SAMPLE])
        least, Q_NK = torch.inf, W_NK
        for grid in splits(round(weights.grid.bits)):
            spec = replace(weights, grid=grid)
            tried = nearest(W_NK, *self.clip.fit(W_NK, spec, H_KK.diagonal()), spec).dequantize()
            error = float((((W_NK - tried) @ H_KK) * (W_NK - tried)).sum())
            if error < least:
                least, Q_NK, weights = error, tried, spec
        if inputs is None:
            return weights, None
        y_TN, least = x_TK @ W_NK.T, torch.inf
        for grid in splits(round(inputs.grid.bits)):
            spec = replace(inputs, grid=grid)
            q_TK = nearest(x_TK, *self.clip.fit(x_TK, spec), spec).dequantize()
            error = float((q_TK @ Q_NK.T - y_TN).square().sum())
            if error < least:
                least, inputs = error, spec
        return weights, inputs


@dataclass(frozen=True, slots=True)
class ClippedInputs:
    """The static scale with the least squared error on sampled inputs."""

    clip: MseClip

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """Sampled rows."""
        return (SAMPLE,)

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """See `InputRange.fit_inputs`."""
        return self.clip.fit(SAMPLE.values(stats[SAMPLE]), spec)


@dataclass(frozen=True, slots=True)
class Preshift:
    """Scale small channels up by powers of two: `s_k = 2^-min(floor(log2(max|x| / max|x_k|)), limit)`."""

    limit: int
    needs: ClassVar[tuple[Stat, ...]] = (AbsMax(),)

    def propose(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `Transform.propose`."""
        top_K = stats[AbsMax()]["max"]
        shift_K = (top_K.amax() / top_K.clamp_min(1e-30)).log2().floor().clamp(0, self.limit)
        return Diagonal(torch.where(top_K > 0, torch.exp2(-shift_K), torch.ones_like(top_K)))


@method(
    "llm-fp4",
    paper=Paper("2310.16836", "LLM-FP4: 4-Bit Floating-Point Quantized Transformers"),
    domains={"llm", "vit"},
    claim="W4A4 on a model with outlier channels: KL below that without shifts, and this below 4-bit integers'",
)
def llm_fp4(bits: int = 4, act_bits: int | None = 4, preshift: bool = True, steps: int = 24) -> Recipe:
    """Search formats and scales of weights (a row) and static inputs (a tensor; None: kept); shift exponents before."""
    widths = [b for b in (bits, act_bits) if b is not None]
    if any(type(b) is not int or not 3 <= b <= 8 for b in widths):
        raise ConfigError(f"bits={bits!r}, act_bits={act_bits!r}: small floats have 3 to 8 bits")
    clip = MseClip(steps=steps, floor=0.3, power=2.0)
    inputs = None
    if act_bits is not None:
        inputs = Spec(grid=MiniFloatGrid(2, act_bits - 3), block=(-1, -1), scale=FloatGrid("float32"))
    return Recipe(
        weights=Spec(grid=MiniFloatGrid(2, bits - 3), block=(1, -1), scale=FloatGrid("float16")),
        inputs=inputs,
        transforms=(Preshift(limit=3),) if preshift and inputs is not None else (),
        grids=FormatSearch(clip),
        range=clip,
        input_range=ClippedInputs(clip),
        objective=LayerMse(),
    )
