"""The judge of diffusion models: how far quantizing moves each denoising step, and the picture in the end."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import Call, Drawing, backbone, watched
from hf_quant.measure.picture_metrics import decibels
from hf_quant.stages.sampler import Batch

PICTURES = 4
TEST = 1000  # seed of the noise that is judged on; calibration has those below
Key = tuple[str, int]


@dataclass
class DiffusionJudge:
    """Every result is kept for the session.

    Attributes:
        path: folder of a diffusers pipeline, unconditional or by class.
        steps: of denoising.
        guidance: scale of classifier-free guidance, where the pipeline has it.
    """

    path: Path
    steps: int = 20
    guidance: float = 1.5
    measured: dict[Key, tuple[list[float], float]] = field(default_factory=dict)
    _expected: tuple[list[Batch], list[Tensor], Tensor] | None = None

    def pipeline(self) -> Any:  # noqa: ANN401
        """The pipeline in float32."""
        from diffusers import DiffusionPipeline

        made = DiffusionPipeline.from_pretrained(self.path).to(torch.float32)
        made.set_progress_bar_config(disable=True)
        return made

    def model(self) -> nn.Module:
        """The network that is quantized."""
        return backbone(self.pipeline())

    def draw(self, pipeline: Any, seed: int) -> Tensor:  # noqa: ANN401
        """Pictures `[PICTURES, H, W, C]` from the noise of a seed."""
        by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters
        asked = Drawing(steps=self.steps)
        if by_class:
            asked = Drawing(steps=self.steps, guidance=self.guidance, class_labels=range(10))
        return asked.draw(pipeline, range(seed, seed + PICTURES), torch.Generator().manual_seed(seed))

    def record(self, seed: int) -> tuple[list[Batch], list[Tensor], Tensor]:
        """What the network is called with at every step, what it answers, and the pictures."""
        pipeline = self.pipeline()
        calls: list[Call] = []
        with watched(backbone(pipeline), calls.append):
            pictures = self.draw(pipeline, seed)
        return [c.batch for c in calls], [c.answer for c in calls], pictures

    def data(self, seed: int) -> list[Batch]:
        """Calibration data of one seed: the inputs at every step of drawing."""
        return self.record(seed)[0]

    @property
    def expected(self) -> tuple[list[Batch], list[Tensor], Tensor]:
        """`record` of the noise that is judged on."""
        if self._expected is None:
            self._expected = self.record(TEST)
        return self._expected

    @torch.no_grad()
    def _measure(self, method: str, seed: int, arguments: dict[str, Any]) -> tuple[list[float], float]:
        config = QuantConfig(method, **arguments)
        key = (repr(config), seed)
        if key not in self.measured:
            pipeline = self.pipeline()
            network = backbone(pipeline)
            hf_quant.quantize(network, config, data=self.data(seed), progress=False)
            self.measured[key] = self.compare(pipeline)
        return self.measured[key]

    @torch.no_grad()
    def compare(self, pipeline: Any) -> tuple[list[float], float]:  # noqa: ANN401
        """What `sqnr` and `trajectory` say of a pipeline that was changed somehow."""
        calls, answers, pictures = self.expected
        network, ratios = backbone(pipeline), []
        for batch, wanted in zip(calls, answers, strict=True):
            noise = (network(**batch).sample - wanted).square().sum() / wanted.square().sum()
            ratios.append(float(decibels(noise)))
        return ratios, float((self.draw(pipeline, TEST) - pictures).square().mean())

    def sqnr(self, method: str, *, seed: int = 0, **arguments: Any) -> list[float]:  # noqa: ANN401
        """Signal to quantization noise of the network's answer at every step, in dB, on full-precision inputs."""
        return self._measure(method, seed, arguments)[0]

    def trajectory(self, method: str, *, seed: int = 0, **arguments: Any) -> float:  # noqa: ANN401
        """Mean squared difference of the final pictures to full precision's, from the same noise."""
        return self._measure(method, seed, arguments)[1]
