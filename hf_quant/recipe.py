"""HfQuantizer, the one plug-in interface, and Recipe, the frozen composition of stages that nearly every method is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from hf_quant.errors import NotSupported
from hf_quant.spec import Spec
from hf_quant.stages.allocator import Allocator
from hf_quant.stages.grid import GridChoice
from hf_quant.stages.objective import Objective
from hf_quant.stages.range import AbsMaxRange, Extremes, InputRange, Range
from hf_quant.stages.repair import Repair
from hf_quant.stages.sampler import MadeUp, Sampler, TextSampler
from hf_quant.stages.serving import Serving
from hf_quant.stages.solver import Nearest, Solver
from hf_quant.stages.splitter import Splitter
from hf_quant.stages.trainer import Trainer
from hf_quant.stages.transform import JoinTransform, OnlineTransform, PairTransform, Transform, WholeTransform
from hf_quant.stages.traversal import Sequential, Traversal
from hf_quant.stages.tuner import BlockUnits, Tuner, Units
from hf_quant.stats import Stat

if TYPE_CHECKING:
    from hf_quant.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a quantizer is asked to do besides the model: data, seed, where to run, where to keep finished blocks.

    Attributes:
        data: calibration data as the user gave it (see `stages.sampler`), or None.
        processor: tokenizer or processor that turns `data` into model inputs, or None.
        seed: of everything drawn at random.
        device: where one block at a time, or one weight without data, is computed; None: where the model is.
        run_dir: finished blocks are written here and a later run with the same job resumes; None: nothing is kept.
        overrides: site name -> another quantizer's recipe for that site, or None to keep it in full precision.
        allow: globs of parameters that may stay unsupported or uncalibrated.
        sites: globs of extra kinds to quantize on request ("embeddings").
    """

    data: Any = None
    processor: Any = None
    seed: int = 0
    device: torch.device | None = None
    run_dir: Path | None = None
    overrides: Mapping[str, "Recipe | None"] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    embeddings: bool = False
    progress: bool = True


HOW_TO_TRAIN = (
    "use a method that does (lsq, lr-qat, l4q, qlora; of diffusion efficientdm), or quantize the model and train an "
    "adapter on it with PEFT"
)


class HfQuantizer(ABC):
    """Every method is one: it takes a model and leaves it quantized. `Recipe` is almost always enough."""

    @abstractmethod
    def quantize(self, model: nn.Module, job: Job) -> "Report":
        """Quantize `model` in place; the report says what was done to every parameter."""

    def finetune(self, model: nn.Module, job: Job) -> "Report":
        """Quantize `model` in place by training it.

        Raises:
            NotSupported: this method does not train.
        """
        raise NotSupported(f"{type(self).__name__} does not train; {HOW_TO_TRAIN}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(HfQuantizer):
    """One value a stage; `pipeline.quantize` runs every recipe. A field left alone is the stage's plain default."""

    weights: Spec
    inputs: Spec | None = None
    cache: Spec | None = None
    format: str | None = None  # a format id; None: the plan takes the first that holds the layer
    sampler: Sampler = TextSampler()
    transforms: tuple[
        Transform | PairTransform | OnlineTransform | JoinTransform | WholeTransform, ...
    ] = ()  # whole ones first
    splitter: Splitter | None = None
    grids: GridChoice | None = None
    range: Range = AbsMaxRange()
    input_range: InputRange = Extremes()
    objective: Objective | None = None
    solver: Solver = Nearest()
    traversal: Traversal = Sequential()
    units: Units = BlockUnits()
    tuner: Tuner | None = None
    allocator: Allocator | None = None
    repairs: tuple[Repair, ...] = ()
    trainer: Trainer | None = None
    serving: Serving | None = None

    @property
    def transform_needs(self) -> tuple[Stat, ...]:
        """Statistics the transforms read, of the input before any rewrite."""
        return tuple(dict.fromkeys(s for t in self.transforms if not isinstance(t, WholeTransform) for s in t.needs))

    @property
    def needs(self) -> tuple[Stat, ...]:
        """Statistics read after the rewrites: of solver, splitter, grids, repairs and static input ranges."""
        wanted: list[Stat] = list(self.objective.needs) if self.objective else []
        wanted += self.splitter.needs if self.splitter else ()
        wanted += self.grids.needs if self.grids else ()
        wanted += [s for r in self.repairs for s in r.needs]
        if self.inputs is not None and self.inputs.stored:
            wanted += self.input_range.needs(self.inputs)
        return tuple(dict.fromkeys(wanted))

    @property
    def data_free(self) -> bool:
        """True when no layer's input need be seen, so that nothing is sampled."""
        runs = any(t.learns if isinstance(t, WholeTransform) else True for t in self.transforms)
        others = self.trainer or self.tuner or self.allocator or self.serving
        return not (self.needs or runs or others)

    @property
    def needs_data(self) -> bool:
        """True when the user must give data."""
        return not self.data_free and not isinstance(self.sampler, MadeUp)

    def quantize(self, model: nn.Module, job: Job) -> "Report":
        """Run the loop."""
        from hf_quant.pipeline import quantize

        return quantize(model, self, job)

    def finetune(self, model: nn.Module, job: Job) -> "Report":
        """Run the loop, which ends with the trainer.

        Raises:
            NotSupported: the recipe has no trainer.
        """
        refuse_untrained(self)
        return self.quantize(model, job)


def refuse_untrained(quantizer: HfQuantizer) -> None:
    """Raises `NotSupported` for a recipe without a trainer."""
    if isinstance(quantizer, Recipe) and quantizer.trainer is None:
        raise NotSupported(f"this method does not train; {HOW_TO_TRAIN}")
