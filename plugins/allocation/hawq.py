"""HAWQ: Hessian aware quantization of neural networks with mixed precision (arXiv:1905.03696).

    S_l = lambda_max(H_l) / n_l         the higher, the more bits;   Omega_l(b) = lambda_max(H_l) ||Q_b(W_l) - W_l||^2

with the largest eigenvalue by power iteration on Hessian-vector products.

Shapes: W_NK weight of a layer; the iterate of the power iteration like it; one loss a slot and width.
Differs from the paper: it sets bits by hand in the order of S; here `min sum S_l ||Q_b(W_l) - W_l||^2` within the
budget does, exactly. No fine-tuning follows. H is that of the KL to the model's own outputs (the Fisher matrix), which
needs no labels; layers that read the same tensor are one, where the paper takes a whole block.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.allocation.curvature import TopEigenvalue
from hf_quant.plugins.allocation.search import Knapsack
from hf_quant.plugins.allocation.widths import integers
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.allocator import Allocator


@method(
    "hawq",
    paper=Paper("1905.03696", "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision"),
    domains={"llm", "vit"},
    claim="at equal size its KL to full precision is below that of a uniform and of a random allocation",
)
def hawq(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Recipe:
    """As large as `bits` everywhere, or as a budget says; rounded to nearest in searched ranges."""
    choices = integers(bits, group_size, symmetric)
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        allocator=Allocator(choices, TopEigenvalue(), Knapsack()),
    )
