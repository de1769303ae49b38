"""QDrop: randomly dropping quantization for extremely low-bit post-training quantization (arXiv:2203.05740).

AdaRound's variables and the steps of the inputs are learned while every value of an activation is rounded only with
probability p, so that what is found is flat in the direction of the activations' noise:

    x~ = m Q(x) + (1 - m) x,  m ~ Bernoulli(p) value by value;   min over V, s_x   E ||f^(x~) - f(x)||^2 + penalty

Shapes: x `[..., K]`, m like it; V like the weight; s_x one value a layer.
Differs from the paper: a value of the block's own input is that of the quantized path where m says so, else of full
precision; s_x begins at the extremes of the calibration and is learned as a logarithm; units are the model's repeated
blocks; penalty and schedule are `adaround`'s.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.sampler import TextSampler


@method(
    "qdrop",
    paper=Paper("2203.05740", "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization"),
    domains={"vit", "llm", "diffusion"},
    claim="KL of a vision transformer below that of the same learning without dropping, weights and inputs at 4 bits",
)
def qdrop(
    bits: int = 4,
    act_bits: int = 4,
    group_size: int = -1,
    steps: int = 1000,
    share: float = 0.5,
    input_lr: float = 1e-2,
    clip_steps: int = 24,
) -> Recipe:
    """Round to nearest in searched ranges, static inputs, then learned rounding and steps with random dropping."""
    return Recipe(
        weights=int_spec(bits, group_size),
        inputs=act_spec(act_bits, static=True, symmetric=False),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=2),
        tuner=Reconstruction(AdaRound(), steps=steps, share=share, input_lr=input_lr),
    )
