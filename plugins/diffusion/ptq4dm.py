"""PTQ4DM: post-training quantization on diffusion models (arXiv:2211.15736).

    t / T ~ clamp(N(mean, std), 0, 1),  mean = std = 0.4;     x_t from the model's own denoising, not from noised images
    (s, z) = argmin E |x - Q(x; s, z)|^2,  one for each layer's input, the same at every timestep

Shapes: W_NK weight, scale `[N, 1]`; one scale and zero point for the whole input tensor of a layer.
Differs from the paper: each step of denoising gets as many samples as the draw of t is expected to give it, so that no
number is drawn; the weights' ranges are searched too; the optional block reconstruction is left to `adaround`, `brecq`.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.calibration.sampled_range import SampledRange
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.timesteps import SkewedNormal
from hf_quant.stages.trajectories import Trajectories


@method(
    "ptq4dm",
    paper=Paper("2211.15736", "Post-training Quantization on Diffusion Models"),
    domains={"diffusion"},
    claim="error of the predicted noise below that after calibration on noised images, or on noise alone",
)
def ptq4dm(
    bits: int = 8,
    act_bits: int = 8,
    calibration_steps: int = 20,
    samples: int = 128,
    mean: float = 0.4,
    std: float = 0.4,
    clip_steps: int = 24,
) -> Recipe:
    """Static ranges of least squared error, calibrated on trajectories, mostly near the image."""
    return Recipe(
        weights=int_spec(bits, -1, symmetric=True),
        inputs=act_spec(act_bits, static=True, symmetric=False),
        sampler=Trajectories(steps=calibration_steps, samples=samples, timesteps=SkewedNormal(mean, std)),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        input_range=SampledRange(MseClip(steps=clip_steps, floor=0.3, power=2.0)),
    )
