"""Temporal feature matters: a framework for diffusion model quantization (arXiv:2407.19547).

    g_i~(t) = s_t (round(g_i(t) / s_t + z_t) - z_t), stored for every timestep t (and class) of a finite set     (cache)
    serve g_i~(t) where || g_i~(t) - g_i(t) ||^2 <= || g_i^(t) - g_i(t) ||^2, else compute g_i^(t)        (selection)

g_i are the layers that end what depends on the timestep (and class) alone, g_i^ as `tfmq-dm` quantizes them. A layer
whose every timestep is stored is gone, and so is all that led to such layers alone.

Shapes: g_i `[timesteps, classes, N_i]`; s and z for every timestep and class.
Differs from the paper: between timesteps of the set stored features are interpolated, so that other schedulers and
numbers of steps work; with more than `classes` classes in the data nothing is stored (the layers are kept); the blocks
are fitted on the stored features; a head that reads the timestep alone is stored, too; see `tfmq-dm` for the rest.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.diffusion.tfmq_dm import tfmq_dm
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Stored where that is nearer to full precision, timestep by timestep and layer by layer. See `Serving`.

    Attributes:
        values: how a row of features is stored.
        entries: timesteps.
        classes: the most whose features are stored.
    """

    values: Spec
    entries: int
    classes: int

    def keeps(self, wanted_ECN: Tensor, stored_ECN: Tensor, own_ECN: Tensor) -> Tensor:
        """See `Serving.keeps`."""
        stored_E, own_E = ((x - wanted_ECN).square().sum((1, 2)) for x in (stored_ECN, own_ECN))
        return own_E < stored_E


@method(
    "tfm-framework",
    paper=Paper("2407.19547", "Temporal Feature Matters: A Framework for Diffusion Model Quantization"),
    domains={"diffusion"},
    claim="stored temporal features are full precision's within 8-bit rounding; pictures no farther off than tfmq-dm's",
)
def tfm_framework(
    bits: int = 4,
    act_bits: int = 8,
    group_size: int = 64,
    feature_bits: int = 8,
    classes: int = 16,
    calibration_steps: int = 20,
    ranges: int = 20,
    samples: int = 128,
    iterations: int = 1000,
    input_lr: float = 5e-3,
    clip_steps: int = 24,
) -> Recipe:
    """As tfmq-dm, and what the temporal layers put out is stored: at inference they are gone."""
    if type(classes) is not int or classes < 1:
        raise ConfigError(f"classes={classes!r}: the most classes whose features are stored, 1 or more")
    made = tfmq_dm(bits, act_bits, group_size, calibration_steps, ranges, samples, iterations, input_lr, clip_steps)
    assert isinstance(made, Recipe)  # noqa: S101
    assert made.inputs is not None  # noqa: S101
    return replace(made, serving=CachedFeatures(int_spec(feature_bits, -1), made.inputs.entries, classes))
