"""4-bit NormalFloat in groups of any size (QLoRA, arXiv:2305.14314).

    w = level[code] * scale,  scale = max |w_group|;  levels: quantiles of the normal distribution over their largest

Shapes: W_NK weight; scale `[N, K / group_size]`.
Differs from the paper: scales are kept in bfloat16 (the paper's double quantization stores them in 8 bits: `bnb-nf4`,
whose bytes are bitsandbytes' own), which lets a group be of any size and the last one of a row be ragged.
"""

import torch

from hf_quant.errors import ConfigError
from hf_quant.grids import FloatGrid, LevelGrid
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, check_group_size


def normal_float(bits: int) -> tuple[float, ...]:
    """The levels of QLoRA's construction: `2^(b-1)` positive and `2^(b-1) - 1` negative quantiles, zero, largest 1."""
    if bits == 4:
        return NF4  # as published: float32 with the rounding of its authors
    n = 1 << bits
    last = (1 - 1 / (2 * (n - 1)) + 1 - 1 / (2 * n)) / 2
    quantiles = [
        torch.special.ndtri(torch.linspace(last, 0.5, k, dtype=torch.float64)[:-1]) for k in (n // 2 + 1, n // 2)
    ]
    levels = torch.cat((quantiles[0], torch.zeros(1, dtype=torch.float64), -quantiles[1])).sort().values
    return tuple((levels / levels.max()).float().tolist())


@method(
    "nf4",
    paper=Paper("2305.14314", "QLoRA: Efficient Finetuning of Quantized LLMs"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="KL below that of symmetric 4-bit integers in the same groups",
)
def nf4(bits: int = 4, group_size: int = 64) -> Recipe:
    """The nearest level, in units of each group's largest magnitude."""
    check_group_size(group_size)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ConfigError(f"bits={bits!r}: 2 to 8, and 4 is NF4")
    return Recipe(weights=Spec(grid=LevelGrid(normal_float(bits)), block=(1, group_size), scale=FloatGrid("bfloat16")))
