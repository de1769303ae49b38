"""W8A8 with static ranges: the plain recipe for integer inference (Krishnamoorthi, arXiv:1806.08342).

    y = (x_int - z_x) s_x (W_int s_w)^T;   s_w = max|W_n| / 127;   s_x, z_x cover [min x, max x] of calibration

Shapes: W_NK weight, scale `[N, 1]`; one scale (and zero point) for the whole input tensor of a layer.
Differs from the paper: ranges are the extremes over all calibration tokens, not their moving average, so that the
result does not depend on the order of the data; inputs are symmetric unless asked; no training.
"""

from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec


@method(
    "int8-default",
    paper=Paper("1806.08342", "Quantizing deep convolutional networks for efficient inference: A whitepaper"),
    domains={"llm", "vit", "vlm", "moe", "diffusion"},
    claim="8-bit weights and static 8-bit inputs keep a trained language model's top-1 token in over 90 % of places",
)
def int8_default(bits: int = 8, act_bits: int = 8, symmetric_inputs: bool = True) -> Recipe:
    """Rounded weights a row, calibrated extremes a tensor."""
    return Recipe(
        weights=int_spec(bits, -1, symmetric=True), inputs=act_spec(act_bits, static=True, symmetric=symmetric_inputs)
    )
