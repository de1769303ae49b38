"""HIGGS's allocation: pushing the limits of LLM quantization via the linearity theorem (arXiv:2411.17525).

    min sum_l alpha_l t_l(b_l)^2,  t_l(b)^2 = ||Q_b(W_l) - W_l||^2 / ||W_l||^2    subject to  sum bits_l(b_l) <= budget

The theorem: for small errors without a direction the loss grows by `sum_l alpha_l t_l^2`. alpha_l is measured once,
with Gaussian noise on layer l alone; the table of (bits, t^2) is that of the grids; the optimum is exact.

Shapes: W_NK weight of a layer; alpha one a layer; one t^2 a layer and width.
Differs from the paper: integer grids in groups with searched ranges, rounded to nearest without a rotation; the loss is
the KL to full precision on calibration data instead of the perplexity; layers that read the same tensor are one.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.allocation.linearity import Linearity
from hf_quant.plugins.allocation.search import Knapsack
from hf_quant.plugins.allocation.widths import integers
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.allocator import Allocator


@method(
    "higgs-dp",
    paper=Paper("2411.17525", "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"),
    domains={"llm", "vit"},
    claim="the sum of alpha t^2 predicts the measured loss, and at equal size its KL is at most a uniform width's",
)
def higgs_dp(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Recipe:
    """As large as `bits` everywhere, or as a budget says; rounded to nearest in searched ranges."""
    choices = integers(bits, group_size, symmetric)
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        allocator=Allocator(choices, Linearity(), Knapsack()),
    )
