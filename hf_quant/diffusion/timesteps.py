"""Timesteps: calibration batches are told which entry of the tables of input ranges each sample belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_quant.errors import CalibrationError, UnsupportedSpec
from hf_quant.plan import Plan
from hf_quant.recipe import Recipe
from hf_quant.runtime.activation import timed
from hf_quant.runtime.clock import CLASSES, NAME, Clock, parameters_of
from hf_quant.runtime.linear import QuantLinear
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import WholeTransform


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """The clock that the layers of a model being quantized share, and the batches it is set by.

    Attributes:
        clock: see there.
        batches: calibration data.
        classes: that will be asked for, whether or not the batches have them.
    """

    clock: Clock
    batches: Sequence[Batch]
    classes: Sequence[int] = ()

    def set_to(self, i: int) -> None:
        """Before a part of the network alone runs on batch i."""
        self.clock.set_to(self.batches[i][NAME], self.batches[i].get(CLASSES))

    def give(self, module: nn.Module) -> None:
        """To every layer with a table."""
        for layer in module.modules():
            if isinstance(layer, QuantLinear) and timed(layer.layer.inputs):
                layer.clock = self.clock


def follow_timesteps(
    model: nn.Module, recipe: Recipe, plan: Plan, batches: list[Batch], classes: Sequence[int] = ()
) -> Timed | None:
    """A clock on the model, and in every batch the tag "@timestep", when the plan has tables by timestep.

    The entries' timesteps are those of the data, or evenly chosen of them when it has more than entries.

    Raises:
        CalibrationError: batches without timesteps, or with fewer than the tables have entries.
        UnsupportedSpec: tables of several sizes, or a stage that does not know them.
        UnsupportedModel: the model takes no timestep.
    """
    sizes = {i.entries for p in plan.sites.values() if (i := p.recipe.inputs) is not None and timed(i)}
    if recipe.serving is not None:
        sizes.add(recipe.serving.entries)
    if not sizes:
        return None
    if len(sizes) > 1:
        raise UnsupportedSpec(f"input ranges by timestep with {sorted(sizes)} entries: one size for the whole model")
    whole = any(isinstance(t, WholeTransform) for t in recipe.transforms)
    if recipe.allocator or recipe.splitter or whole:
        raise UnsupportedSpec("input ranges by timestep do not go with an allocator, splitter or rotation yet")
    parameters_of(model)
    if any(NAME not in b for b in batches):
        raise CalibrationError("input ranges by timestep need batches with the model's `timestep`, [] or [B]")
    found = torch.cat([b[NAME].reshape(-1).float().cpu() for b in batches]).unique()
    entries = sizes.pop()
    if len(found) < entries:
        raise CalibrationError(
            f"the data has {len(found)} timesteps, too few for {entries} input ranges: calibrate with more steps of "
            "denoising, or ask for fewer ranges"
        )
    chosen = found[torch.linspace(0, len(found) - 1, entries).round().long()]
    clock = Clock(chosen.tolist())
    clock.watch(model)
    for batch in batches:
        batch["@" + NAME] = clock.nearest(batch[NAME])
    return Timed(clock, batches, classes)
