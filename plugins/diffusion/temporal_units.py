"""TemporalUnits: what depends on the timestep and class alone is one unit; the rest is cut up as ever."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_quant.diffusion.temporal import TemporalBlock, temporal_block
from hf_quant.errors import UnsupportedModel
from hf_quant.sites import Site
from hf_quant.stages.sampler import Batch
from hf_quant.stages.tuner import BlockUnits, Unit, Units

NAME = "temporal"


@dataclass(frozen=True, slots=True)
class TemporalUnits:
    """Blocks without their temporal layers, and the temporal layers of the whole model together, over all timesteps.

    Attributes:
        others: cuts up the layers that are not temporal.
    """

    others: Units = BlockUnits()

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """See `Units.units`; the temporal unit is there when there are batches.

        Raises:
            UnsupportedModel: no layer depends on the timestep alone.
        """
        if not batches:
            return self.others.units(model, blocks, sites, batches)
        found: TemporalBlock | None = temporal_block(model, [s.name for s in sites], batches[0])
        if found is None:
            raise UnsupportedModel(
                f"no layer of {type(model).__name__} depends on its timestep alone: use q-diffusion or adaround"
            )
        rest = [s for s in sites if s.name not in found.sites]
        calls = tuple(((), conditions) for conditions in found.conditions(batches))
        return [*self.others.units(model, blocks, rest, batches), Unit(NAME, found, found.sites, calls)]
