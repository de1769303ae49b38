"""Trainer: quantization-aware training of a whole model, ending in the codes of its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer
from hf_quant.qtensor import QTensor
from hf_quant.running.distributed import refuses_training as refuses_processes
from hf_quant.runtime.activation import refuses as refuses_inputs
from hf_quant.runtime.branches import Branch
from hf_quant.stages.fakequant import Rounding, ShapeBound
from hf_quant.stages.reconstruction import Kl
from hf_quant.stages.sampler import Batch
from hf_quant.stages.tuner import Fitted, UnitLoss


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What a trainer gives back.

    Attributes:
        weights: site -> codes.
        measured: "steps", "tokens", "first_loss", "last_loss" (of ten steps), "seconds", "trained" (values that were),
            "optimizer_bytes" (of this process). The loop adds "logits" (the largest there is on the probe) and
            "logit_difference".
        branches: site -> what was trained beside the codes.
        input_ranges: site -> (scale, zero) of its input, `[entries, 1]`, where that is static.
        probe: one batch and the answer of the student when training ended: what the packed model has to say of it.
        kept: vectors that stay in full precision and were trained too, by the parameter's name.
    """

    weights: dict[str, QTensor]
    measured: dict[str, float]
    branches: dict[str, Branch] = field(default_factory=dict)
    input_ranges: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    probe: tuple[Batch, Tensor] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


class Trainer(Protocol):
    """Trains the weights (or low-rank terms, or scales) of a float model so that rounding them loses little."""

    def refuses(self, model: nn.Module, layer: Layer) -> str | None:
        """None when it can train such a layer of this model, else the reason (asked at plan time)."""

    def check(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Raises `CalibrationError` or `UnsupportedModel` for data that it cannot train on (before any work)."""

    def train(
        self,
        model: nn.Module,
        start: Mapping[str, Fitted],
        batches: Sequence[Batch],
        seed: int,
        folder: Path | None = None,
        others: Mapping[str, nn.Module] | None = None,
    ) -> Trained:
        """Fit the sites of `start`, which hold what the solver gave.

        `model` comes in float; the trainer fake-quantizes it (see `stages.fakequant`). Nothing of the training is left
        in it; the pipeline installs the codes. With a `folder`, checkpoints are kept there and a
        training that was cut off goes on from the last. `others` are the float layers of sites that are quantized and
        not trained: a teacher has them.
        """


@dataclass(frozen=True, slots=True)
class Qat:
    """The one trainer: whatever a rounding learns, against the model's own full precision, by transformers' Trainer.

    `distill loss(student, teacher) + (1 - distill) (the model's own loss)`; the teacher is the same model with its
    weights as they were and its inputs not rounded, so it takes no memory. Learning rates are the rounding's own
    (`FakeQuant.learned`).

    Attributes:
        rounding: how a weight is parametrized.
        loss: how far the student's answer (logits, or what else a model puts out) is from the teacher's.
        input_lr: learning rate of the logarithm of static input steps, each entry of a table by timestep has its own;
            0 leaves them as they were fitted.
        steps: optimizer steps.
        batch_size: sequences (or whatever a row of the data is) a step, of all processes together.
        distill: weight of the teacher, 0 to 1; 0: no teacher runs.
        schedule: of the learning rates, after a warm-up over the first tenth.
        clip: largest norm of the gradient.
        lr_norms: learning rate of vectors (gains of norms, biases), which stay in full precision, as a share of their
            root mean square; 0: they stay what they were.
        gradient_checkpointing: blocks compute their activations again in the backward pass: less memory, more time.
    """

    rounding: Rounding
    loss: UnitLoss = Kl(kept="float32")
    input_lr: float = 0.0
    steps: int = 200
    batch_size: int = 8
    distill: float = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0
    lr_norms: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: a positive integer")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill={self.distill!r}: a number from 0 (no teacher) to 1 (nothing else)")
        of_rounding = {n: getattr(self.rounding, n) for n in dir(self.rounding) if n.startswith("lr")}
        for name, rate in {**of_rounding, "input_lr": self.input_lr, "lr_norms": self.lr_norms}.items():
            if not 0 <= rate < math.inf:
                raise ConfigError(f"{name}={rate!r}: a learning rate, 0 (nothing of it is learned) or above")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ConfigError(f"schedule={self.schedule!r}: linear, cosine or constant")
        if self.loss.gradients:
            raise ConfigError(f"{type(self.loss).__name__} needs gradients of cached outputs; train with Kl or Mse")

    def refuses(self, model: nn.Module, layer: Layer) -> str | None:
        """What the rounding refuses, models that cannot compute activations again, and processes it cannot run in."""
        if self.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
            return f"{type(model).__name__} has no gradient checkpointing"
        if refusal := refuses_processes(self.batch_size):
            return refusal
        if hasattr(next(model.parameters()), "ds_id"):
            return (
                "the model was shared out by DeepSpeed when it was loaded, and every process calibrates and needs the "
                "weights; load it before an Accelerator is made, or launch with --zero3_init_flag false"
            )
        if layer.inputs is not None and layer.inputs.power != 1:
            return "inputs with scales for columns cannot be trained with"
        refusal = self.rounding.refuses(layer.weights) or refuses_inputs(layer.inputs)
        if refusal is None and isinstance(self.rounding, ShapeBound):
            return self.rounding.refuses_matrix(layer.shape, layer.weights)
        return refusal

    def check(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Rows of one kind, and labels where they are needed."""
        from hf_quant.learning.rows import check_labels, rows_of

        rows_of(batches)
        if self.distill < 1:
            check_labels(model, batches)

    def train(
        self,
        model: nn.Module,
        start: Mapping[str, Fitted],
        batches: Sequence[Batch],
        seed: int,
        folder: Path | None = None,
        others: Mapping[str, nn.Module] | None = None,
    ) -> Trained:
        """See `Trainer.train`."""
        from hf_quant.learning.training import train

        return train(self, model, start, batches, seed, folder, others or {})
