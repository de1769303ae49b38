"""NoisyQuant: a fixed noise added before rounding, and taken out after, lowers the error (arXiv:2211.16056).

    y = W Q(x + N) + (b - W N),   N_k ~ U(-n, n) drawn once,   n = argmin over [0, step] of  E |Q(x + n u) - n u - x|^2

Heavy-tailed activations gather between two levels; the noise spreads them, and rounding errors cancel in the product.

Shapes: x_TK inputs; N_K one value a channel; W_NK.
Differs from the paper: on top of uniform rounding only, static a tensor or dynamic a token; what is searched is the
error of the input, not of the output; n = 0 (no noise) is among the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.range import Range
from hf_quant.stages.transform import Online
from hf_quant.stats import MinMax, Rows, Stat, Stats


@dataclass(frozen=True, slots=True)
class FixedNoise:
    """Search the width of the noise in `steps` steps up to that of the grid."""

    steps: int = 20
    seed: int = 0
    needs: ClassVar[tuple[Stat, ...]] = (Rows(512), MinMax())

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: at least 1")

    def online(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Online | None:
        """See `OnlineTransform.online`."""
        if inputs is None:
            return None
        x_TK, extremes = Rows(512).values(stats[Rows(512)]), stats[MinMax()]
        g = torch.Generator().manual_seed(self.seed)
        u_K = (2 * torch.rand(x_TK.shape[1], generator=g) - 1).to(x_TK)
        if inputs.range == "static":
            step = float(from_extremes(extremes["min"][None, None], extremes["max"][None, None], inputs)[0])
        else:
            blocks = as_blocks(x_TK, inputs)
            step = float(from_extremes(blocks.amin(-1), blocks.amax(-1), inputs)[0].mean())
        widths = [step * i / self.steps for i in range(self.steps + 1)]
        errors = [error(x_TK, n * u_K, inputs, extremes["min"], extremes["max"]) for n in widths]
        best = min(range(len(errors)), key=errors.__getitem__)
        return Online(shift_K=widths[best] * u_K) if best else None


def error(x_TK: Tensor, N_K: Tensor, inputs: Spec, low: Tensor, high: Tensor) -> float:
    """`E || Q(x + N) - N - x ||^2`, Q in the range of x + N."""
    noisy = x_TK + N_K
    if inputs.range == "static":
        scale, zero = from_extremes((low + N_K.min())[None, None], (high + N_K.max())[None, None], inputs)
    else:
        blocks = as_blocks(noisy, inputs)
        scale, zero = from_extremes(blocks.amin(-1), blocks.amax(-1), inputs)
    return float((nearest(noisy, scale, zero, inputs).dequantize() - noisy).square().mean())


@method(
    "noisyquant",
    paper=Paper("2211.16056", "NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization"),
    domains={"vit", "llm"},
    claim="error of heavy-tailed activations below that of rounding without noise, at 4 to 6 bits",
)
def noisyquant(bits: int = 6, act_bits: int = 6, static: bool = True, steps: int = 20) -> Recipe:
    """Rounded weights a row, noisy inputs a tensor (static) or a token."""
    return Recipe(
        weights=int_spec(bits, -1, symmetric=True),
        inputs=act_spec(act_bits, static=static, symmetric=False),
        transforms=(FixedNoise(steps),),
    )
