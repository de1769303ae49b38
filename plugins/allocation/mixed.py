"""Mixed precision: bits a layer by the harm of its rounding to the model's outputs; what `budget=` uses by default.

Folklore (no arXiv paper of its own): the Fisher form of the rounding error and an exact knapsack.

    min sum_l 1/2 E_l(b_l)^T F E_l(b_l)   subject to   sum_l bits_l(b_l) <= budget,   E_l(b) = Q_b(W_l) - W_l

Shapes: one loss a slot and choice; bits are the true ones, scales and zero points counted.
Differs from the paper: there is none; sites that read the same tensor are rounded, and chosen for, together.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.allocation.fisher import Fisher
from hf_quant.plugins.allocation.search import Knapsack
from hf_quant.plugins.allocation.widths import integers
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.allocator import Allocator


@method(
    "mixed",
    paper=Paper(None, "Mixed precision by the Fisher form of the rounding error"),
    domains={"llm", "vit", "vlm", "moe"},
    claim="at the size of a uniform width its KL to full precision is below that of rounding to nearest at that width",
)
def mixed(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Recipe:
    """Rounding to nearest at the size of `bits` everywhere; `QuantConfig(method, budget=...)` allocates for others."""
    choices = integers(bits, group_size, symmetric)
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric), allocator=Allocator(choices, Fisher(), Knapsack())
    )
