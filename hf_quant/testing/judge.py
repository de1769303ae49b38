"""The judge: quantizes a trained model of the bench and measures how far that moves it.

Claims about quality are decided here, never on random weights. The models lie in the repository, see `bench.py`; a
model of your own makes a `Judge` just as well.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.stages.sampler import Batch
from hf_quant.testing.outliers import inject_outliers

SEEDS = range(3)
Key = tuple[str, int, bool]


@torch.no_grad()
def log_probabilities(model: nn.Module, x: Tensor, inputs: str = "input_ids") -> Tensor:
    """Of every next token `[windows, length, vocabulary]`, or of every class `[images, classes]`."""
    return torch.cat([model(**{inputs: part}).logits.log_softmax(-1) for part in x.split(8)])


@dataclass
class Judge:
    """Every result is kept for the session, so that methods share their baselines.

    Attributes:
        path: folder of the trained model.
        kind: the class whose `from_pretrained` loads it.
        calibration: token ids `[n, S]` or images `[n, 3, H, W]`.
        test: held-out ones.
        inputs: the model's argument that takes them.
        samples: how many of the calibration one seed gets; no seed sees those of another.
    """

    path: Path
    kind: Any
    calibration: Tensor
    test: Tensor
    inputs: str = "input_ids"
    samples: int = 16
    measured: dict[Key, tuple[float, float]] = field(default_factory=dict)
    _expected: Tensor | None = None

    @property
    def expected(self) -> Tensor:
        """Log-probabilities of the full-precision model on `test`."""
        if self._expected is None:
            self._expected = log_probabilities(self.model(), self.test, self.inputs)
        return self._expected

    def model(self, outliers: bool = False) -> nn.Module:
        """The model in float32; `outliers`: with the outlier channels that large models have and it lacks."""
        model: nn.Module = self.kind.from_pretrained(self.path, dtype=torch.float32).eval()
        if outliers:
            inject_outliers(model, {self.inputs: self.test[:1]})
        return model

    def data(self, seed: int) -> Any:  # noqa: ANN401  what QuantConfig takes
        """Calibration data of one seed: token ids, or batches of images."""
        mine = self.calibration[seed * self.samples : (seed + 1) * self.samples]
        return mine if self.inputs == "input_ids" else [Batch({self.inputs: part}) for part in mine.split(8)]

    def _measure(self, method: str, seed: int, outliers: bool, arguments: dict[str, Any]) -> tuple[float, float]:
        config = QuantConfig(method, **arguments)
        key = (repr(config), seed, outliers)
        if key not in self.measured:
            model = self.model(outliers)
            hf_quant.quantize(model, config, data=self.data(seed), progress=False)
            self.measured[key] = self.distance(model)
        return self.measured[key]

    def distance(self, model: nn.Module) -> tuple[float, float]:
        """(mean KL from the full-precision model in nats, percent of predictions that stay the same)."""
        log_q = log_probabilities(model, self.test, self.inputs)
        kl = (self.expected.exp() * (self.expected - log_q)).sum(-1).mean()
        same = (self.expected.argmax(-1) == log_q.argmax(-1)).float().mean()
        return float(kl), 100 * float(same)

    def kl(self, method: str, *, seed: int = 0, outliers: bool = False, **arguments: Any) -> float:  # noqa: ANN401
        """Mean KL of a prediction to the original model's, on held-out data."""
        return self._measure(method, seed, outliers, arguments)[0]

    def kls(self, method: str, *, outliers: bool = False, **arguments: Any) -> list[float]:  # noqa: ANN401
        """`kl` for each of three seeds of calibration data: what `claims.order` compares."""
        return [self.kl(method, seed=seed, outliers=outliers, **arguments) for seed in SEEDS]

    def top1(self, method: str, *, seed: int = 0, outliers: bool = False, **arguments: Any) -> float:  # noqa: ANN401
        """Percent of held-out predictions whose most likely outcome stays the same."""
        return self._measure(method, seed, outliers, arguments)[1]
