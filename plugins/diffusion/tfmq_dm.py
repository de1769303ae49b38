"""TFMQ-DM: temporal feature maintenance quantization for diffusion models (arXiv:2311.16503).

    min over rounding of the temporal layers   sum_t sum_i || g_i^(t) - g_i(t) ||^2          (temporal-aware)
    x^ = s_t (clamp(round(x / s_t) + z_t) - z_t),   one (s_t, z_t) for every timestep        (finite set)

g_i are the layers that end what depends on the timestep (and class) alone: the projections of a U-Net's embedding,
the modulations of a transformer. They are fitted together, without images; all other layers block by block.

Shapes: t `[B]`; g_i `[B, N_i]`; scale and zero of a layer's input `[timesteps, 1]`.
Differs from the paper: the temporal layers are found by watching a forward, not by their names; they are fitted at the
timesteps and classes of the data, before the blocks, which then see what they compute; weights have a scale and a zero
point for every `group_size` columns, as `q-diffusion`'s; the finite set of ranges is used for every layer's input,
since a table costs nothing at inference; they are searched, then learned with the rounding; rounding, penalty and
schedule are `adaround`'s, with fewer steps.
"""

from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.diffusion.temporal_units import TemporalUnits
from hf_quant.plugins.diffusion.timed_inputs import timed_inputs
from hf_quant.plugins.diffusion.timed_rows import TimedRange
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from hf_quant.stages.reconstruction import Reconstruction
from hf_quant.stages.trajectories import Trajectories


@method(
    "tfmq-dm",
    paper=Paper("2311.16503", "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models"),
    domains={"diffusion"},
    claim="temporal features closer to full precision's than after reconstruction of blocks",
)
def tfmq_dm(
    bits: int = 4,
    act_bits: int = 8,
    group_size: int = 64,
    calibration_steps: int = 20,
    ranges: int = 20,
    samples: int = 128,
    iterations: int = 1000,
    input_lr: float = 5e-3,
    clip_steps: int = 24,
) -> Recipe:
    """Learned rounding, the temporal layers by themselves, and input ranges for each of `ranges` timesteps."""
    return Recipe(
        weights=int_spec(bits, group_size),
        inputs=timed_inputs(act_bits, ranges, calibration_steps),
        sampler=Trajectories(steps=calibration_steps, samples=samples, batch_size=8),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        input_range=TimedRange(MseClip(steps=clip_steps, floor=0.3, power=2.0)),
        units=TemporalUnits(),
        tuner=Reconstruction(AdaRound(), steps=iterations, input_lr=input_lr),
    )
