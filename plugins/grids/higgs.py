"""HIGGS: Hadamard-rotated weights on the best grids for a Gaussian, without data (arXiv:2411.17525).

    v = R w;  s = sqrt(mean v^2) of a group;  code: the nearest of n points to v / s, p weights at a time

A random Hadamard rotation makes the weights of a group nearly Gaussian, and for that the grid with the least squared
error is known: by the linearity theorem the loss grows with exactly that error.

Shapes: W_NK weight; codes `[N, K / p]`; scale `[N, K / group_size]` in float16; R in blocks along K.
Differs from the paper: R has the largest power of two that divides both group_size and K as its size, so no weight is
padded; grids are of p = 1, 2, 4 dimensions and at most 256 points, fitted on a million samples; bits are uniform here,
not allocated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import FloatGrid, GaussianGrid
from hf_quant.hadamard import Hadamard
from hf_quant.method import Paper, method
from hf_quant.qtensor import as_blocks, round_scale
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec


@dataclass(frozen=True, slots=True)
class RootMeanSquare:
    """The scale that gives the values of a block a mean square of one."""

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        count = as_blocks(torch.ones_like(W_NK, dtype=torch.float32), spec).sum(-1)
        return round_scale((as_blocks(W_NK, spec).square().sum(-1) / count).sqrt(), spec), None


@method(
    "higgs",
    paper=Paper("2411.17525", "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="KL below that of normal-float levels with at least as many true bits, at 4 and 3 bits",
)
def higgs(bits: int = 4, vector: int = 2, group_size: int = 1024) -> Recipe:
    """Rotate, normalize a group, take the nearest point of the grid for `vector` weights at a time."""
    if type(group_size) is not int or group_size < 1 or group_size & (group_size - 1):
        raise ConfigError(f"group_size={group_size!r}: a power of two, the size of the rotation")
    if vector not in (1, 2, 4) or type(bits) is not int or not 1 <= bits <= 8 // vector:
        raise ConfigError(f"bits={bits!r}, vector={vector!r}: 1 to 8 bits for 1 weight a code, 4 for 2, 2 for 4")
    return Recipe(
        weights=Spec(
            grid=GaussianGrid(1 << (bits * vector), vector),
            block=(1, group_size),
            scale=FloatGrid("float16"),
            rotation=Hadamard(group_size, 0),
        ),
        range=RootMeanSquare(),
    )
