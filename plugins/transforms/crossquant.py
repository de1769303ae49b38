"""CrossQuant: the step of an activation depends on its token and on its channel (arXiv:2410.07505).

    step_tk = t_t^a c_k^(1-a) / (2^(b-1) - 1),   t_t = max_k |x_tk| of the token,   c_k = max_t |x_tk| of the channel

with a = 0.15; a = 1 is rounding a token. Small values beside an outlier are then no longer rounded to zero (what the
paper calls the quantization kernel).

Shapes: x_TK; t_T computed while the model runs; c_K `[K]`, stored to the power as `input_columns`.
Differs from the paper: the channels' maxima are those of the calibration (its static form), and stay with the
activation; a channel that calibration never saw active takes the mean of the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, cross_spec, int_spec
from hf_quant.stats import AbsMax, Stat, Stats


@dataclass(frozen=True, slots=True)
class ColumnMax:
    """`c_k^(1 - power)` with the largest magnitude of every channel."""

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """Maxima of channels."""
        return (AbsMax(),)

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """`[1, K]` columns, no zero point."""
        c_K = stats[AbsMax()]["max"]
        c_K = torch.where(c_K > 0, c_K, c_K.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        return c_K.pow(1 - spec.power)[None], None


@method(
    "crossquant",
    paper=Paper("2410.07505", "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel"),
    domains={"llm", "vit", "vlm", "moe"},
    claim="fewer activations rounded to zero, and KL below token-wise rounding's, with outlier channels",
)
def crossquant(bits: int = 8, act_bits: int = 8, group_size: int = -1, alpha: float = 0.15) -> Recipe:
    """Rounded weights, cross-scaled inputs."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=True), inputs=cross_spec(act_bits, alpha), input_range=ColumnMax()
    )
