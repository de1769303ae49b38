"""Evaluation: what was measured on a model, or on a pipeline. Values, with JSON both ways."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_quant.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured; None means: not measured. Standard errors are those of a mean over windows.

    Attributes:
        kl: mean over tokens of `KL(full precision || model)`, in nats.
        top1: tokens (%) whose most likely next token is the one of full precision.
        perplexity: `exp(mean -log p(next token))` within a window, teacher forced.
        reference_perplexity: the same of the full-precision model.
        loss_increase: mean of the next token's `-log p` minus that of full precision, in nats: the log of the ratio of
            the perplexities. Both see the same texts, so its standard error is far below theirs.
        kl_error: standard error of `kl`; None for a single window.
        top1_error: of `top1`.
        perplexity_error: of `perplexity`; mostly the spread between texts.
        loss_increase_error: of `loss_increase`.
        windows: how many windows were run.
        window: tokens in each.
        data: what they were cut from.
        bits_per_weight: true bits a quantized weight, everything stored counted; None when nothing is quantized.
        bytes_on_disk: of the weight files in the folder that the model was loaded from.
        peak_bytes: most memory in use meanwhile: the GPU's when there is one, else resident memory of the process.
        peak_holds: which models that memory held.
        tokens_per_second: tokens through the model's forward pass (prefill) a second, reference and scoring left out.
        batch_size: windows a forward pass.
        device: where it ran.
        dtype: it ran in.
        seconds: of everything, the killed runs that were resumed included.
        command: the call that measured it.
    """

    kl: float | None
    top1: float | None
    perplexity: float
    reference_perplexity: float | None
    kl_error: float | None
    top1_error: float | None
    perplexity_error: float | None
    windows: int
    window: int
    data: str
    bits_per_weight: float | None
    bytes_on_disk: int | None
    peak_bytes: int
    peak_holds: str
    tokens_per_second: float
    batch_size: int
    device: str
    dtype: str
    seconds: float
    command: str
    loss_increase: float | None = None
    loss_increase_error: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens run."""
        return self.windows * self.window

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Evaluation":
        """Inverse of `to_json`."""
        return cls(**data)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineEvaluation:
    """What was measured on a diffusion pipeline; None means: not measured. The reference starts from the same noise.

    Attributes:
        timesteps: at which the network was called, in the order of denoising.
        sqnr: `10 log10 |e|^2 / |e - e_q|^2` of the network's answer at each of them, in dB, both networks called with
            what full precision meets; over all pictures.
        trajectory: mean squared difference, at each of them, of what was denoised so far: `x_t` of either pipeline.
        picture_mse: of the final pictures, values in 0 .. 1.
        psnr: `-10 log10 picture_mse`, mean over pictures, in dB.
        psnr_error: its standard error; None for one picture.
        accuracy: pictures (%) that the classifier reads as the class they were drawn of.
        reference_accuracy: the same of full precision.
        agreement: pictures (%) in which it reads the same class as in full precision's.
        frechet_to_reference: Fréchet distance to full precision's pictures, in the features of the classifier.
        frechet_to_data: to the real pictures that were given.
        reference_frechet_to_data: of full precision's pictures to the real ones.
        images: how many were drawn.
        steps: of denoising.
        guidance: scale of classifier-free guidance; None: the pipeline's own, or there is none.
        seed: picture i starts from the noise of `seed + i`.
        classifier: who read.
        data: how many real pictures.
        bits_per_weight: true bits a quantized weight, everything stored counted; None when nothing is quantized.
        stored_bytes: of the tensors of all components, as they would be saved.
        bytes_on_disk: of the weight files in the folder that the pipeline was loaded from.
        peak_bytes: most memory in use while the pipeline drew: the GPU's when there is one, else of the process.
        peak_holds: which pipelines that memory held.
        seconds_per_image: of the whole pipeline, median over batches.
        reference_seconds_per_image: the same of full precision, in the same run.
        batch_size: pictures at a time.
        device: where it ran.
        dtype: it ran in.
        seconds: of everything.
        command: the call that measured it.
    """

    timesteps: tuple[float, ...]
    sqnr: tuple[float, ...] | None
    trajectory: tuple[float, ...] | None
    picture_mse: float | None
    psnr: float | None
    psnr_error: float | None
    accuracy: float | None
    reference_accuracy: float | None
    agreement: float | None
    frechet_to_reference: float | None
    frechet_to_data: float | None
    reference_frechet_to_data: float | None
    images: int
    steps: int
    guidance: float | None
    seed: int
    classifier: str | None
    data: int | None
    bits_per_weight: float | None
    stored_bytes: int
    bytes_on_disk: int | None
    peak_bytes: int
    peak_holds: str
    seconds_per_image: float
    reference_seconds_per_image: float | None
    batch_size: int
    device: str
    dtype: str
    seconds: float
    command: str

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PipelineEvaluation":
        """Inverse of `to_json`."""
        rows: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**rows)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def measured_of(report: Report) -> Evaluation | None:
    """The evaluation that a report holds (`dataclasses.replace(report, measured=evaluation.to_json())`), if any."""
    return Evaluation.from_json(report.measured) if report.measured else None
