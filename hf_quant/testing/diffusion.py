"""The judge of diffusion models: how far quantizing moves each denoising step, and the picture in the end."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.stages.sampler import Batch

PICTURES = 4
TEST = 1000  # seed of the noise that is judged on; calibration has those below
Key = tuple[str, int, tuple[tuple[str, Any], ...]]


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

    @torch.no_grad()
    def draw(self, pipeline: Any, seed: int) -> Tensor:  # noqa: ANN401
        """Pictures `[PICTURES, H, W, C]` from the noise of a seed."""
        given: dict[str, Any] = {"batch_size": PICTURES}
        if "class_labels" in inspect.signature(pipeline.__call__).parameters:
            labels = [(seed + i) % 10 for i in range(PICTURES)]
            given = {"class_labels": labels, "guidance_scale": self.guidance}
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(num_inference_steps=self.steps, generator=generator, output_type="np", **given)
        return torch.as_tensor(drawn.images)

    def record(self, seed: int) -> tuple[list[Batch], list[Tensor], Tensor]:
        """What the network is called with at every step, what it answers, and the pictures."""
        pipeline = self.pipeline()
        network = backbone(pipeline)
        calls: list[Batch] = []
        answers: list[Tensor] = []

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
            given = inspect.signature(network.forward).bind(*args, **kwargs).arguments
            batch = {k: v for k, v in given.items() if isinstance(v, Tensor)}
            rows = len(next(iter(batch.values())))
            calls.append({k: v.expand(rows) if v.dim() == 0 else v for k, v in batch.items()})
            answers.append(out[0] if isinstance(out, tuple) else out.sample)

        handle = network.register_forward_hook(watch, with_kwargs=True)
        try:
            pictures = self.draw(pipeline, seed)
        finally:
            handle.remove()
        return calls, answers, pictures

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
        key = (method, seed, tuple(sorted(arguments.items())))
        if key not in self.measured:
            pipeline = self.pipeline()
            network = backbone(pipeline)
            hf_quant.quantize(network, QuantConfig(method, **arguments), data=self.data(seed), progress=False)
            calls, answers, pictures = self.expected
            ratios = []
            for batch, wanted in zip(calls, answers, strict=True):
                noise = (network(**batch).sample - wanted).square().sum() / wanted.square().sum()
                ratios.append(float(-10 * noise.clamp_min(1e-20).log10()))
            self.measured[key] = ratios, float((self.draw(pipeline, TEST) - pictures).square().mean())
        return self.measured[key]

    def sqnr(self, method: str, *, seed: int = 0, **arguments: Any) -> list[float]:  # noqa: ANN401
        """Signal to quantization noise of the network's answer at every step, in dB, on full-precision inputs."""
        return self._measure(method, seed, arguments)[0]

    def trajectory(self, method: str, *, seed: int = 0, **arguments: Any) -> float:  # noqa: ANN401
        """Mean squared difference of the final pictures to full precision's, from the same noise."""
        return self._measure(method, seed, arguments)[1]


def backbone(pipeline: Any) -> nn.Module:  # noqa: ANN401
    """The U-Net or transformer of a pipeline."""
    network: nn.Module = getattr(pipeline, "unet", None) or pipeline.transformer
    return network
