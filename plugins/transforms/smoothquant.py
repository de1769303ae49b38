"""SmoothQuant: move the outliers of activations into the weights (arXiv:2211.10438).

    s_k = max|x_k|^alpha / max|W_:k|^(1 - alpha);   x_k <- x_k / s_k (folded into the norm before),  W_:k <- W_:k s_k

The function stays the same; with alpha = 0.5 inputs and weights end up equally hard to quantize.

Shapes: x_TK inputs of a group of layers; s_K; W_NK of each layer, the maximum over all of the group.
Differs from the paper: folded wherever a producer can take the scale (also v -> o and up -> down), not after norms
only; a channel that is zero in all of the calibration, or in all weights, keeps s = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.range import Range
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import AbsMax, Stat, Stats


@dataclass(frozen=True, slots=True)
class Smooth:
    """Split the dynamic range of each channel between inputs and weights by `alpha`."""

    alpha: float = 0.5
    needs: ClassVar[tuple[Stat, ...]] = (AbsMax(),)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r}: a number from 0 (all in the inputs) to 1 (all in the weights)")

    def propose(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `Transform.propose`."""
        x_K = stats[AbsMax()]["max"]
        w_K = torch.stack([W.abs().amax(0) for W in Ws]).amax(0).float()
        s_K = x_K.pow(self.alpha) / w_K.pow(1 - self.alpha)
        return Diagonal(torch.where((x_K > 0) & (w_K > 0), s_K, torch.ones_like(s_K)))


@method(
    "smoothquant",
    paper=Paper(
        "2211.10438", "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
    ),
    domains={"llm", "vit", "vlm", "moe"},
    claim="KL below W8A8 without smoothing, static and dynamic, on a model with outlier channels",
)
def smoothquant(alpha: float = 0.5, bits: int = 8, act_bits: int = 8, static: bool = False) -> Recipe:
    """Smooth, then round weights a row and inputs a token (or a tensor: `static`)."""
    return Recipe(
        weights=int_spec(bits, -1, symmetric=True),
        inputs=act_spec(act_bits, static=static),
        transforms=(Smooth(alpha),),
    )
