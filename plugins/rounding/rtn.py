"""Round to nearest: the data-free baseline every other method is compared with.

Folklore (no arXiv paper of its own; the integer arithmetic is that of arXiv:1712.05877).

    scale = (max(W, 0) - min(W, 0)) / (2^b - 1),  zero = round(-min / scale),  code = round(W / scale) + zero

Shapes: W_NK weight; scale and zero `[N, K / group_size]`.
Differs from the paper: group-wise or per output channel instead of per tensor; no activations are quantized.
"""

from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec


@method(
    "rtn",
    paper=Paper(None, "Round to nearest"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="each stored value is the nearest one of its group's grid, and more bits never make a layer worse",
)
def rtn(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Recipe:
    """Every stage left at its plain default."""
    return Recipe(weights=int_spec(bits, group_size, symmetric=symmetric))
