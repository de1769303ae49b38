"""Evaluate a pipeline: how far a quantized diffusion pipeline is from full precision, at every timestep and in the end.

Both draw from equal noise, a batch of pictures at a time. While full precision draws, the quantized network is called
with the same inputs. What stays of a batch are sums, errors and what the classifier read (`drawn.py`): a line of the
resume file.
"""

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
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
from hf_quant.measure.batch_log import append, resumed
from hf_quant.measure.drawn import distances, per_image, readings
from hf_quant.measure.evaluation import PipelineEvaluation
from hf_quant.measure.picture_metrics import Classifier, read_pictures, squared_errors
from hf_quant.measure.reference_logits import identity
from hf_quant.running.progress import track
from hf_quant.running.resources import Peak, device_name


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
    dtype: torch.dtype | None = None,
    resume: str | Path | None = None,
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
        dtype: what is loaded computes in; None: float32, a reference in that of the model.
        resume: a file that grows by a line a batch; a killed run given the same file goes on to the identical result.
        command: how this was called; None: this call in words.
        progress: show a bar on a terminal, with the time that is left.

    Raises:
        CheckpointError: nothing at a path, or a damaged file.
        UnsupportedModel: no pipeline there, one that draws from more than noise, classes and texts, or no classifier.
        ConfigError: an impossible argument, missing prompts or classes, a network without its reference.
        CalibrationError: no real pictures in `data`, or too few for a distance.
        RunError: pictures are not finite, or `resume` belongs to another evaluation.
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
        network: Any = model if isinstance(model, nn.Module) else load_model(model, dtype=dtype or torch.float32)
        reference = _pipeline(reference, device, network.dtype)
        model = with_network(reference, network)
    ours = _pipeline(model, device, dtype)
    labels = tuple(class_labels) or _labels(ours, reader)
    asked = Drawing(steps=steps, guidance=guidance, class_labels=labels, prompts=prompts)
    asked.check(ours)
    log, done = None if resume is None else Path(resume), list[dict[str, Any]]()
    if log is not None:
        pieces = (ours, reference, None if reader is None else reader.model)
        key = [_identity(piece) for piece in pieces]
        done = resumed(log, {"of": key, "asked": repr(asked), "images": images, "batch": batch_size, "seed": seed})
    began, peak = time.perf_counter(), Peak(ours.device)
    loaded = reference is not None and not isinstance(reference, str | Path)
    theirs: Any = None
    starts = range(len(done) * batch_size, images, batch_size)
    for start in track(starts, description="drawing", enabled=progress):
        numbers = range(start, min(start + batch_size, images))
        noise = [seed + i for i in numbers]
        mine = _draw(ours, asked, numbers, noise)
        held = peak.bytes() if theirs is None or loaded else 0
        full, beside = None, None
        if reference is not None:
            theirs = theirs or _pipeline(reference, device, dtype or ours.dtype)
            beside = _Beside(backbone(ours), mine.calls)
            full = _draw(theirs, asked, numbers, noise, beside)
        done.append(
            {
                "ours": mine.kept(reader),
                "theirs": None if full is None else full.kept(reader),
                "steps": beside.sums if beside else [[c.timestep] for c in mine.calls],
                "squares": None if full is None else squared_errors(mine.pictures, full.pictures).tolist(),
                "peak": held,
                "seconds": time.perf_counter() - began,
            }
        )
        began = time.perf_counter()
        if log is not None:
            append(log, done[-1])
    ledgers = [count_bits(c) for c in ours.components.values() if isinstance(c, nn.Module)]
    weights = sum(ledger.weights for ledger in ledgers)
    drawn = asked.labels(range(images))
    return PipelineEvaluation(
        **distances(done),
        **readings(done, drawn, None if reader is None or real is None else reader.read(real)[1]),
        images=images,
        steps=steps,
        guidance=guidance,
        seed=seed,
        classifier=None if classifier is None else _name(classifier),
        data=None if real is None else len(real),
        bits_per_weight=sum(ledger.weight_bits for ledger in ledgers) / weights if weights else None,
        stored_bytes=sum(ledger.bytes for ledger in ledgers),
        bytes_on_disk=None if folder is None else bytes_on_disk(folder),
        peak_bytes=max(batch["peak"] for batch in done),
        peak_holds="the pipeline and the reference" if loaded else "the pipeline",
        seconds_per_image=per_image(done, "ours"),
        reference_seconds_per_image=None if reference is None else per_image(done, "theirs"),
        batch_size=batch_size,
        device=device_name(ours.device),
        dtype=str(ours.dtype).removeprefix("torch."),
        seconds=sum(batch["seconds"] for batch in done),
        command=command or f"hf_quant.measure.evaluate_pipeline.evaluate_pipeline(..., images={images}, steps={steps})",
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A batch of pictures of one pipeline, what its network was called with, and seconds a picture."""

    pictures: Tensor
    calls: list[Call]
    seconds: float

    def kept(self, reader: Classifier | None) -> dict[str, Any]:
        """What stays of it, JSON-safe."""
        classes, features = (None, None) if reader is None else (v.tolist() for v in reader.read(self.pictures))
        return {"seconds": self.seconds, "classes": classes, "features": features}


def _draw(
    pipeline: Any,  # noqa: ANN401
    asked: Drawing,
    numbers: Sequence[int],
    noise: Sequence[int],
    beside: "_Beside | None" = None,
) -> _Drawn:
    """Draw these pictures. `beside` sees each call, and its time is not counted."""
    generators = [torch.Generator().manual_seed(i) for i in noise]
    calls: list[Call] = []
    began = _now(pipeline.device)
    with watched(backbone(pipeline), beside or calls.append), quiet(pipeline):
        pictures = asked.draw(pipeline, numbers, generators)
    spent = _now(pipeline.device) - began - (beside.seconds if beside else 0)
    return _Drawn(pictures, calls, spent / len(numbers))


class _Beside:
    """Calls the quantized network with what full precision meets, and adds up how its answers differ.

    Attributes:
        sums: for each call `[t, |e - e_q|^2, |e|^2, |x - x_q|^2, values]`, see `drawn.distances`.
    """

    def __init__(self, network: nn.Module, calls: list[Call]) -> None:
        self.network, self.calls = network, calls
        self.sums: list[list[float]] = []
        self.seconds = 0.0

    def __call__(self, call: Call) -> None:
        """A call of full precision's network."""
        device, seen = call.answer.device, len(self.sums)
        began = _now(device)
        wanted = call.answer.double()
        with answering([self.network]):
            answer = answer_of(self.network(**_cast(call.arguments, self.network)))
        if seen >= len(self.calls) or self.calls[seen].sample.shape != call.sample.shape:
            raise UnsupportedModel(
                "the reference is another pipeline: its network is called otherwise than the model's"
            )
        drift = float((self.calls[seen].sample.double() - call.sample.double()).square().sum())
        noise, signal = float((answer - wanted).square().sum()), float(wanted.square().sum())
        self.sums.append([call.timestep, noise, signal, drift, call.sample.numel()])
        self.seconds += _now(device) - began


def _cast(arguments: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """A sample and its conditions in the network's own type; the timestep stays what it is."""
    kind = getattr(network, "dtype", torch.float32)
    return {
        name: value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 else value
        for name, value in arguments.items()
    }


def _identity(given: Any) -> str | list[str] | None:  # noqa: ANN401  a pipeline, a network, a path, nothing
    if given is None:
        return None
    if isinstance(given, nn.Module):
        return identity(given)
    if not isinstance(given, str | Path):
        return [identity(c) for c in given.components.values() if isinstance(c, nn.Module)]
    files = sorted(Path(given).rglob("*.safetensors"))
    return [_digest(f) for f in files] or str(given)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _pipeline(given: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:  # noqa: ANN401
    if isinstance(given, str | Path):
        return load_pipeline(given, device, dtype)
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
