"""W8A8 with a scale for each token, computed while the model runs: no calibration (after arXiv:2206.01861).

    y = (x_int s_t) (W_int s_n)^T,   s_t = max_k |x_tk| / 127,   s_n = max_k |W_nk| / 127

Shapes: W_NK weight, scale `[N, 1]`; x_TK inputs, one scale a token.
Differs from the paper: ZeroQuant quantizes weights in groups and distills layer by layer; this is its token-wise
activation quantization with one weight scale a row, what most int8 kernels run.
"""

from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec


@method(
    "dynamic-w8a8",
    paper=Paper(
        "2206.01861", "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers"
    ),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="KL below static W8A8's on a model with outlier channels",
)
def dynamic_w8a8(bits: int = 8, act_bits: int = 8) -> Recipe:
    """Rounded weights a row, absolute maximum a token."""
    return Recipe(weights=int_spec(bits, -1, symmetric=True), inputs=act_spec(act_bits))
