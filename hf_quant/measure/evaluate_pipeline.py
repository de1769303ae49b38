"""Evaluate a pipeline: how far a quantized diffusion pipeline is from full precision, at every timestep and in the end.

Both draw from equal noise, a batch of pictures at a time. While full precision draws, the quantized network is called
with the same inputs; nothing but sums, the pictures and one batch's trajectory is kept.
"""

import inspect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.diffusion.denoising import quiet
from hf_quant.diffusion.drawing import Call, Drawing, answer_of, answering, backbone, watched
from hf_quant.diffusion.loading_pipeline import INDEX, bytes_on_disk, load_pipeline, with_network
from hf_quant.errors import ConfigError, UnsupportedModel
from hf_quant.ledger import count_bits
from hf_quant.loading import load_model
from hf_quant.measure.evaluation import PipelineEvaluation
from hf_quant.measure.picture_metrics import Classifier, decibels, frechet_distance, psnr, read_pictures
from hf_quant.running.progress import track
from hf_quant.running.resources import Peak, device_name

READINGS = (
    "accuracy",
    "reference_accuracy",
    "agreement",
    "frechet_to_reference",
    "frechet_to_data",
    "reference_frechet_to_data",
)


@torch.no_grad()
def evaluate_pipeline(
    model: Any,  # noqa: ANN401  a DiffusionPipeline
    reference: Any = None,  # noqa: ANN401
    data: Tensor | str | Path | None = None,
    *,
    classifier: nn.Module | str | Path | None = None,
    class_labels: Sequence[int] = (),
    prompts: Sequence[str] = (),
    steps: int = 20,
    guidance: float | None = None,
    images: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> PipelineEvaluation:
    """Measure a diffusion pipeline on `images` pictures, picture i from the noise of `seed + i`.

    Args:
        model: the (quantized) pipeline, or a folder or Hub id to load it from; or its network alone, a model or a
            folder, which is then put into the reference.
        reference: the full-precision pipeline, likewise. None: no SQNR, no trajectories, no PSNR.
        data: real pictures for the Fréchet distance: a folder of them, or `[n, H, W, C]` in 0 .. 1.
        classifier: an image classifier of transformers, or a folder or Hub id of one. None: no accuracy, no distance.
        class_labels: pictures are drawn of these, round and round; () for a pipeline by class: all of the classifier's.
        prompts: likewise, for pipelines that draw from texts.
        steps: of denoising.
        guidance: scale of classifier-free guidance; None: the pipeline's own.
        images: how many.
        batch_size: at a time.
        seed: of the noise of the first.
        device: where to run; None: where the pipeline is.
        command: how this was called; None: this call in words.
        progress: show a bar on a terminal, with the time that is left.

    Raises:
        CheckpointError: nothing at a path, or a damaged file.
        UnsupportedModel: no pipeline there, one that draws from more than noise, classes and texts, or no classifier.
        ConfigError: an impossible argument, missing prompts or classes, a network without its reference.
        CalibrationError: no real pictures in `data`, or too few for a distance.
        RunError: pictures are not finite.
    """
    if images < 1 or batch_size < 1:
        raise ConfigError(f"images={images}, batch_size={batch_size}: 1 or more")
    reader = None if classifier is None else Classifier.load(classifier)
    if data is not None and reader is None:
        raise ConfigError("data is compared with in the features of a classifier: name one")
    real = read_pictures(data) if isinstance(data, str | Path) else data
    folder = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    alone = isinstance(model, nn.Module) or (folder is not None and not (folder / INDEX).is_file())
    if model is reference and reference is not None and not isinstance(model, str | Path):
        raise ConfigError("the model is the reference itself: quantized in place? Load full precision again")
    if alone and reference is None:
        raise ConfigError("a network alone draws nothing: give the pipeline it belongs to as the reference")
    if alone:
        network = model if isinstance(model, nn.Module) else load_model(model)
        reference = _pipeline(reference, device)
        model = with_network(reference, network)
    ours = _Side(_pipeline(model, device), seed)
    labels = tuple(class_labels) or _labels(ours.pipeline, reader)
    asked = Drawing(steps=steps, guidance=guidance, class_labels=labels, prompts=tuple(prompts))
    asked.check(ours.pipeline)
    began, peak, peak_bytes = time.perf_counter(), Peak(ours.pipeline.device), 0
    loaded = reference is not None and not isinstance(reference, str | Path)
    theirs: _Side | None = None
    errors: dict[float, _Errors] = {}
    for start in track(range(0, images, batch_size), description="drawing", enabled=progress):
        numbers = range(start, min(start + batch_size, images))
        calls = ours.draw(asked, numbers)
        peak_bytes = max(peak_bytes, peak.bytes()) if theirs is None or loaded else peak_bytes
        if reference is not None:
            theirs = theirs or _Side(_pipeline(reference, device), seed)
            theirs.draw(asked, numbers, _Beside(backbone(ours.pipeline), calls, errors))
        for call in calls:
            errors.setdefault(call.timestep, _Errors())
    ledgers = [count_bits(c) for c in ours.pipeline.components.values() if isinstance(c, nn.Module)]
    weights = sum(ledger.weights for ledger in ledgers)
    return PipelineEvaluation(
        timesteps=tuple(errors),
        **_distances(ours, theirs, list(errors.values())),
        **_readings(reader, asked, ours, theirs, real),
        images=images,
        steps=steps,
        guidance=guidance,
        seed=seed,
        classifier=None if classifier is None else _name(classifier),
        data=None if real is None else len(real),
        bits_per_weight=sum(ledger.weight_bits for ledger in ledgers) / weights if weights else None,
        stored_bytes=sum(ledger.bytes for ledger in ledgers),
        bytes_on_disk=None if folder is None else bytes_on_disk(folder),
        peak_bytes=peak_bytes,
        peak_holds="the pipeline and the reference" if loaded else "the pipeline",
        seconds_per_image=statistics.median(ours.seconds),
        reference_seconds_per_image=statistics.median(theirs.seconds) if theirs else None,
        batch_size=batch_size,
        device=device_name(ours.pipeline.device),
        dtype=str(ours.pipeline.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - began,
        command=command or f"hf_quant.measure.evaluate_pipeline.evaluate_pipeline(..., images={images}, steps={steps})",
    )


@dataclass
class _Errors:
    """Sums of squares at a timestep: of the answers' difference, of full precision's answer, of the difference in x."""

    noise: float = 0.0
    signal: float = 0.0
    drift: float = 0.0
    values: int = 0


@dataclass
class _Side:
    """One of the two pipelines: what it drew, and seconds a picture of each batch."""

    pipeline: Any
    seed: int
    pictures: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def draw(self, asked: Drawing, numbers: Sequence[int], beside: "_Beside | None" = None) -> list[Call]:
        """Draw these pictures; the calls of its network. `beside` sees each, and its time is not counted."""
        noise = [torch.Generator().manual_seed(self.seed + i) for i in numbers]
        calls: list[Call] = []
        began = _now(self.pipeline.device)
        with watched(backbone(self.pipeline), beside or calls.append), quiet(self.pipeline):
            self.pictures.append(asked.draw(self.pipeline, numbers, noise))
        spent = _now(self.pipeline.device) - began - (beside.seconds if beside else 0)
        self.seconds.append(spent / len(numbers))
        return calls


@dataclass
class _Beside:
    """Calls the quantized network with what full precision meets, and adds up how its answers differ."""

    network: nn.Module
    calls: list[Call]
    errors: dict[float, _Errors]
    seen: int = 0
    seconds: float = 0.0

    def __call__(self, call: Call) -> None:
        """A call of full precision's network."""
        device = call.answer.device
        began = _now(device)
        sums = self.errors.setdefault(call.timestep, _Errors())
        wanted = call.answer.double()
        with answering([self.network]):
            answer = answer_of(self.network(**call.arguments))
        sums.noise += float((answer - wanted).square().sum())
        sums.signal += float(wanted.square().sum())
        if self.seen >= len(self.calls) or self.calls[self.seen].sample.shape != call.sample.shape:
            raise UnsupportedModel(
                "the reference is another pipeline: its network is called otherwise than the model's"
            )
        sums.drift += float((self.calls[self.seen].sample.double() - call.sample.double()).square().sum())
        sums.values += call.sample.numel()
        self.seen += 1
        self.seconds += _now(device) - began


def _distances(ours: _Side, theirs: _Side | None, errors: list[_Errors]) -> dict[str, Any]:
    if theirs is None:
        return dict.fromkeys(("sqnr", "trajectory", "picture_mse", "psnr", "psnr_error"))
    x, y = torch.cat(ours.pictures), torch.cat(theirs.pictures)
    decibels_B = psnr(x, y)
    return {
        "sqnr": tuple(float(decibels(torch.tensor(e.noise / max(e.signal, 1e-300)))) for e in errors),
        "trajectory": tuple(e.drift / e.values for e in errors),
        "picture_mse": float((x.double() - y.double()).square().mean()),
        "psnr": float(decibels_B.mean()),
        "psnr_error": float(decibels_B.std()) / math.sqrt(len(x)) if len(x) > 1 else None,
    }


def _readings(
    reader: Classifier | None, asked: Drawing, ours: _Side, theirs: _Side | None, real: Tensor | None
) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(READINGS)
    if reader is None:
        return found
    mine, features = reader.read(torch.cat(ours.pictures))
    drawn = asked.labels(range(len(mine)))
    labels = None if drawn is None else torch.tensor(drawn)
    if labels is not None:
        found["accuracy"] = _percent(mine == labels)
    data = None if real is None else reader.read(real)[1]
    if data is not None:
        found["frechet_to_data"] = frechet_distance(features, data)
    if theirs is None:
        return found
    full, reference_features = reader.read(torch.cat(theirs.pictures))
    found["agreement"] = _percent(mine == full)
    found["frechet_to_reference"] = frechet_distance(features, reference_features) if len(mine) > 1 else None
    if labels is not None:
        found["reference_accuracy"] = _percent(full == labels)
    if data is not None:
        found["reference_frechet_to_data"] = frechet_distance(reference_features, data)
    return found


def _percent(right_B: Tensor) -> float:
    return 100 * float(right_B.double().mean())


def _pipeline(given: Any, device: torch.device | str | None) -> Any:  # noqa: ANN401
    if isinstance(given, str | Path):
        return load_pipeline(given, device)
    if not hasattr(given, "components"):
        raise UnsupportedModel(f"{type(given).__name__} is no pipeline of diffusers")
    return given if device is None else given.to(device)


def _labels(pipeline: Any, reader: Classifier | None) -> Sequence[int]:  # noqa: ANN401
    """The classifier's classes, for a pipeline that draws by class."""
    by_class = "class_labels" in inspect.signature(pipeline.__call__).parameters
    return range(reader.classes) if by_class and reader else ()


def _name(classifier: nn.Module | str | Path) -> str:
    return type(classifier).__name__ if isinstance(classifier, nn.Module) else Path(classifier).name


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
