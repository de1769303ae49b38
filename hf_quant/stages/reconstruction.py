"""Reconstruction: the Tuner that fits by gradient what FakeQuants parametrize, against cached outputs.

    min over what is learned   E over micro-batches [ loss(unit_q(x), unit_fp(x~)) ] + penalty

Adam with a cosine schedule, micro-batches drawn from the seed. The inputs x come from the quantized path, or each of
their values from one of both paths (QDrop, arXiv:2203.05740). What is kept is the best that was seen once rounded
hard, the start included, so a unit never ends worse than it began on the data.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_quant.capture import first_tensor, to_device
from hf_quant.errors import CalibrationError, ConfigError
from hf_quant.products import widened
from hf_quant.running.progress import inner
from hf_quant.runtime.activation import refuses
from hf_quant.runtime.conv import convolutions
from hf_quant.sites import linear_shape
from hf_quant.spec import Spec
from hf_quant.stages.fakequant import FakeQuant, Learned, Rounding
from hf_quant.stages.input_quant import InputQuant
from hf_quant.stages.tuner import Call, Example, Fitted, Unit, UnitLoss


@dataclass(frozen=True, slots=True)
class Mse:
    """Squared error of the output: sum over features, mean over tokens."""

    gradients: ClassVar[bool] = False

    def remember(self, out: Tensor) -> Tensor:
        """The output."""
        return out

    def loss(self, out: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """`mean over tokens of ||out - target||^2`."""
        return (out.float() - target.float()).square().sum(-1).mean()


@dataclass(frozen=True, slots=True)
class FisherMse:
    """Squared error weighed by the diagonal of the Fisher information at the output (BRECQ, arXiv:2102.05426)."""

    gradients: ClassVar[bool] = True

    def remember(self, out: Tensor) -> Tensor:
        """The output."""
        return out

    def loss(self, out: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """`mean over tokens of sum g^2 (out - target)^2`."""
        assert weight is not None  # noqa: S101  the loop gives it where `gradients` asks
        return (weight.float() * (out.float() - target.float()).square()).sum(-1).mean()


@dataclass(frozen=True, slots=True)
class Kl:
    """KL divergence of the logits' distributions, full precision || quantized: for whole models."""

    kept: Literal["float16", "float32"] = "float16"  # what is cached: half the room, and wrong by less than 0.01 each
    gradients: ClassVar[bool] = False

    def remember(self, out: Tensor) -> Tensor:
        """Log-probabilities."""
        return out.float().log_softmax(-1).to(getattr(torch, self.kept))

    def loss(self, out: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Mean over tokens."""
        return F.kl_div(out.float().log_softmax(-1), target.float(), log_target=True, reduction="none").sum(-1).mean()


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as `W_NK`, in float32."""
    return (weight.T if transposed else weight.flatten(1)).float()


def _transposed(module: nn.Module) -> bool:
    found = linear_shape(module)
    return found is not None and found[0] == "conv1d"


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a site as `W_NK`, in float32, apart from the graph."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    return _matrix(weight.detach(), _transposed(module))


class _OnWeight(nn.Module):
    """A FakeQuant of `W_NK` as the parametrization of a stored weight.

    GPT-2's is transposed, a convolution's has more axes.
    """

    def __init__(self, fake: FakeQuant, transposed: bool) -> None:
        super().__init__()
        self.fake, self.transposed = fake, transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """`W_NK` in float32."""
        return _matrix(weight, self.transposed)

    def forward(self, weight: Tensor) -> Tensor:
        """The stored weight's shape and type."""
        W_NK: Tensor = self.fake(self.matrix(weight)).to(weight.dtype)
        return W_NK.mT if self.transposed else W_NK.reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """See the module.

    Attributes:
        rounding: what is learned of the weights.
        loss: of a unit's output.
        steps: of the optimizer, each on `batch` micro-batches.
        batch: micro-batches a step.
        share: probability that a value of the unit's inputs, and of the rounded inputs of its layers, comes from the
            quantized path while learning; QDrop takes 0.5, and 1.0 mixes nothing.
        input_lr: learning rate of the logarithm of static input steps; 0 leaves them as they were fitted.
        checks: how often the hard loss over all data is measured; the best state is kept.
        warmup: share of the steps in which the learning rates rise to where the cosine schedule has them.
    """

    rounding: Rounding
    loss: UnitLoss = Mse()
    steps: int = 1000
    batch: int = 1
    share: float = 1.0
    input_lr: float = 0.0
    checks: int = 4
    warmup: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("checks", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={value!r}: an integer of at least {least}")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share!r}: a probability, the share of values from the quantized path")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup={self.warmup!r}: a share of the steps, below 1")

    def rate(self, step: int) -> float:
        """What a step's learning rates are multiplied by: `cos^2(pi t / 2)`, and less while they rise."""
        rising = self.warmup * self.steps
        return (1 + math.cos(math.pi * step / self.steps)) / 2 * (min(1.0, (step + 1) / rising) if rising else 1.0)

    def refuses(self, weights: Spec, inputs: Spec | None) -> str | None:
        """What the rounding refuses, and inputs that cannot be rounded at run time."""
        return self.rounding.refuses(weights) or refuses(inputs)

    @torch.enable_grad()
    def tune(
        self, unit: Unit, start: Mapping[str, Fitted], examples: Sequence[Example], seed: int
    ) -> dict[str, Fitted]:
        """See `Tuner.tune`.

        Raises:
            CalibrationError: the loss is not finite.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {unit.name}".encode()))
        with _faked(unit, start, self, generator) as (weights, inputs):
            fit = _Fit(self, unit, examples, weights, inputs, generator)
            if not fit.run():
                return dict(start)
            with torch.no_grad():
                ended = {name: on.fake.export(on.matrix(_original(unit.sites[name]))) for name, on in weights.items()}
                ranges = {name: quant.fitted() for name, quant in inputs.items()}
        return {name: replace(start[name], q=q, input_range=ranges.get(name)) for name, q in ended.items()}


def _original(module: nn.Module) -> Tensor:
    original: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return original


@contextmanager
def _faked(
    unit: Unit, start: Mapping[str, Fitted], how: Reconstruction, generator: torch.Generator
) -> Iterator[tuple[dict[str, _OnWeight], dict[str, InputQuant]]]:
    """The unit with fake-quantized weights and inputs, nothing else of it asking for gradients."""
    asked = [p for p in unit.module.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    weights: dict[str, _OnWeight] = {}
    inputs: dict[str, InputQuant] = {}
    handles, whole = [], convolutions(unit.module)
    try:
        for name, module in unit.sites.items():
            on = _OnWeight(how.rounding.start(matrix_of(module), start[name].q, generator), _transposed(module))
            parametrize.register_parametrization(module, "weight", on, unsafe=True)
            weights[name] = on
            if start[name].inputs is not None:
                quant = inputs[name] = InputQuant(start[name], how.share, how.input_lr, generator)
                handles.append(quant.place(module, whole).register_forward_pre_hook(quant.before))
        yield weights, inputs
    finally:
        for handle in handles:
            handle.remove()
        for name in weights:
            parametrize.remove_parametrizations(unit.sites[name], "weight", leave_parametrized=False)
        for parameter in asked:
            parameter.requires_grad_(True)


@dataclass(slots=True, eq=False)
class _Fit:
    """One unit being fitted."""

    how: Reconstruction
    unit: Unit
    examples: Sequence[Example]
    weights: dict[str, _OnWeight]
    inputs: dict[str, InputQuant]
    generator: torch.Generator
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.unit.module.parameters()).device

    @property
    def fakes(self) -> list[FakeQuant]:
        return [on.fake for on in self.weights.values()]

    def run(self) -> bool:
        """Learn; ends hard, in the best state. False when that is the start."""
        how, learned = self.how, self._learned()
        least = begun = self.measure()
        best: list[Tensor] | None = None
        if not (how.steps and learned):
            return False
        optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in learned])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, how.rate)
        due = {round(how.steps * (i + 1) / how.checks) for i in range(how.checks)}
        drawn = self._draw()
        for step in inner(range(how.steps), description=self.unit.name, total=how.steps):
            self._step(optimizer, step / how.steps, begun, [next(drawn) for _ in range(how.batch)])
            schedule.step()
            if step + 1 in due:
                loss = self.measure()
                if loss < least:
                    least, best = loss, [p.detach().clone() for p, _ in learned]
        if best is not None:
            for (parameter, _), kept in zip(learned, best, strict=True):
                parameter.data.copy_(kept)
        for fake in self.fakes:
            fake.anneal(1.0)
        return best is not None

    def _learned(self) -> list[Learned]:
        parts: list[FakeQuant | InputQuant] = [*self.fakes, *self.inputs.values()]
        return [pair for part in parts for pair in part.learned()]

    def _step(self, optimizer: torch.optim.Optimizer, progress: float, begun: float, drawn: Sequence[int]) -> None:
        optimizer.zero_grad()
        penalties = [p for fake in self.fakes if (p := fake.anneal(progress)) is not None]
        for i in drawn:
            (self._loss(self.examples[i], mixed=True) / len(drawn)).backward()
        if penalties:
            (sum(penalties, torch.zeros((), device=self.device)) * begun / len(penalties)).backward()
        for fake in self.fakes:
            fake.before_step()
        optimizer.step()
        for fake in self.fakes:
            fake.after_step()

    def _draw(self) -> Iterator[int]:
        """Micro-batches, every one once before any comes again."""
        while True:
            yield from torch.randperm(len(self.examples), generator=self.generator).tolist()

    @torch.no_grad()
    def measure(self) -> float:
        """The hard loss over all data."""
        for fake in self.fakes:
            fake.anneal(1.0)
        for quant in self.inputs.values():
            quant.eval()
        total = sum(float(self._loss(example, mixed=False)) for example in self.examples) / len(self.examples)
        for quant in self.inputs.values():
            quant.train()
        if total != total or total == float("inf"):
            raise CalibrationError(f"the loss of {self.unit.name} is {total}: its inputs or weights are not finite")
        return total

    def _loss(self, example: Example, mixed: bool) -> Tensor:
        args, kwargs = to_device(self._mix(example) if mixed else example.call, self.device)
        for quant in self.inputs.values():
            quant.entry_B = example.entry_B
        if example.enter is not None:
            example.enter()
        with parametrize.cached(), widened():
            out = first_tensor(self.unit.module(*args, **kwargs))
        weight = None if example.weight is None else example.weight.to(self.device)
        return self.how.loss.loss(out, example.target.to(self.device), weight)

    def _mix(self, example: Example) -> Call:
        """The quantized path's arguments, with values of full precision where the coin says so."""
        if self.how.share == 1:
            return example.call

        def mix(q: Any, fp: Any) -> Any:  # noqa: ANN401  nested arguments of any kind
            if isinstance(q, Tensor) and isinstance(fp, Tensor) and q.is_floating_point() and q is not fp:
                return torch.where(torch.rand(q.shape, generator=self.generator) < self.how.share, q, fp)
            if isinstance(q, tuple) and isinstance(fp, tuple):
                return tuple(mix(a, b) for a, b in zip(q, fp, strict=True))
            if isinstance(q, dict) and isinstance(fp, dict):
                return {name: mix(value, fp[name]) for name, value in q.items()}
            return q

        mixed: Call = mix(example.call, example.fp_call)
        return mixed
