"""FOEM: first-order error matters, accurate compensation for quantized language models (arXiv:2507.11017).

Compensated weights W have left the originals W0, so the error around them has a first-order term `g = (W - W0) H`.
Its Newton step, scaled by beta and with `H^-1 H = I`, pulls a column back before it is rounded, in the loop of GPTQ:

    w_i -= beta (w_i - w0_i);  q = Q(w_i);  e = (w_i - q - beta (w_i - w0_i)) / U_ii;  W[:, i+1:] -= e (x) U[i, i+1:]

Shapes: W_NK weight as compensated, W0_NK as given; U_KK upper.
Differs from the paper: this is the form of the authors' contribution to GPTQModel (beta = 0.2), which costs nothing;
the paper's own sums over all columns behind at every step (beta = 3e-4 for its scale of H). The pull is applied to
every column, where that code leaves out the first of each lazy block. GPTAQ's drift is added with `alpha` > 0.
"""

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptaq import Drift
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.objective import AsymmetricMse, LayerMse


@method(
    "foem",
    paper=Paper("2507.11017", "First-Order Error Matters: Accurate Compensation for Quantized Large Language Models"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="equals gptq at beta 0; KL below gptq's at 2 bits with 16 calibration sequences, a row a scale",
)
def foem(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = False,
    clip_steps: int = 24,
    beta: float = 0.2,
    alpha: float = 0.0,
) -> Recipe:
    """Gptq that pulls each column back by `beta`; with `alpha`, towards the full-precision output as GPTAQ."""
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r}: a number from 0 (GPTQ) to 1 (nothing is compensated)")
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=AsymmetricMse() if alpha else LayerMse(),
        solver=Gptq(damp=damp, act_order=act_order, corrections=(Drift(alpha),) if alpha else (), pull=beta),
    )
