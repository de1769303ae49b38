"""BRECQ: pushing the limit of post-training quantization by block reconstruction (arXiv:2102.05426).

AdaRound's variables, learned for a block together, against its output weighed by the Fisher information there:

    min over V   E[ sum g^2 (z^ - z)^2 ] + penalty,   g = d log p(y | x) / dz at the block's output z

Shapes: z, g `[..., C]` like the block's output; V like the weight.
Differs from the paper: y is drawn from the model's own prediction (the paper takes labels), for models without logits
from a Gaussian around the answer; the mean of g^2 over a micro-batch is 1; blocks are the model's repeated ones; inputs
come from the quantized path; rounding, penalty and schedule are those of `adaround`.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.reconstruction import FisherMse, Reconstruction
from hf_quant.stages.sampler import TextSampler


@method(
    "brecq",
    paper=Paper("2102.05426", "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction"),
    domains={"vit", "llm", "diffusion"},
    claim="KL of a vision transformer below that of adaround layer by layer, at 2 bits; never worse than its start",
)
def brecq(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    steps: int = 1000,
    clip_steps: int = 24,
) -> Recipe:
    """Round to nearest in searched ranges, then learned rounding of blocks, their outputs weighed by gradients."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        sampler=TextSampler(batch_size=2),
        tuner=Reconstruction(AdaRound(), loss=FisherMse(), steps=steps),
    )
