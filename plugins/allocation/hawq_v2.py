"""HAWQ-V2: Hessian aware trace-weighted quantization of neural networks (arXiv:1911.03852).

    min sum_l Omega_l(b_l),  Omega_l(b) = tr(H_l) / n_l * ||Q_b(W_l) - W_l||^2    subject to  sum bits_l(b_l) <= budget

with the trace by Hutchinson's estimator, `tr(H) = E v^T H v` over random signs v, and the point of the Pareto front of
(bits, sum of Omega) that the budget allows.

Shapes: W_NK weight of a layer; v like it; one loss a slot and width.
Differs from the paper: no fine-tuning follows; H is that of the KL to the model's own outputs (the Fisher matrix), for
which no labels are needed, and at a minimum of the training loss is what its Hessian is; weights only; the front is
searched exactly; layers that read the same tensor are one.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.allocation.curvature import HutchinsonTrace
from hf_quant.plugins.allocation.search import Pareto
from hf_quant.plugins.allocation.widths import integers
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.allocator import Allocator


@method(
    "hawq-v2",
    paper=Paper("1911.03852", "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks"),
    domains={"llm", "vit"},
    claim="at the size of uniform 3 bits its KL to full precision is below uniform's and below hawq's",
)
def hawq_v2(bits: int = 4, group_size: int = 128, symmetric: bool = False) -> Recipe:
    """As large as `bits` everywhere, or as a budget says; rounded to nearest in searched ranges."""
    choices = integers(bits, group_size, symmetric)
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        allocator=Allocator(choices, HutchinsonTrace(), Pareto()),
    )
