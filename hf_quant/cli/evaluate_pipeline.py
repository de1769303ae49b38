"""What `hf-quant evaluate` does with a pipeline of diffusers."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_quant.cli.output import size
from hf_quant.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hf_quant.measure.evaluation import PipelineEvaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options that only pipelines have; None: not given."""

    classifier: str | None = None
    classes: int | None = None
    prompts: Path | None = None
    images: int | None = None
    steps: int | None = None
    guidance: float | None = None
    dtype: str | None = None
    plot: Path | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were."""
        every = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in every.items() if value is not None}

    def refuse(self) -> None:
        """For a language model.

        Raises:
            ConfigError: names those that were given.
        """
        if self.given:
            raise ConfigError(
                f"{', '.join('--' + n for n in self.given)}: for a pipeline, and this is a language model"
            )


def measure(
    model: str,
    reference: str | None,
    data: Path | None,
    asked: Asked,
    *,
    batch_size: int | None,
    device: str | None,
    resume: Path | None,
) -> "PipelineEvaluation":
    """`evaluate_pipeline` on what lies at these places; the command it keeps names no path of this machine."""
    from hf_quant.measure.evaluate_pipeline import evaluate_pipeline

    if asked.classifier is None and (found := classifier_beside(model, reference)) is not None:
        asked = replace(asked, classifier=str(found))
    options = asked.given
    plot, classes, prompts = options.pop("plot", None), options.pop("classes", None), options.pop("prompts", None)
    words = ["hf-quant", "evaluate", _shown(model), *([] if data is None else [_shown(data)])]
    words += [] if reference is None else ["--reference", _shown(reference)]
    for name, value in asked.given.items():
        words += [] if name == "plot" else [f"--{name}", _shown(value)]
    if classes is not None:
        options["class_labels"] = range(classes)
    if prompts is not None:
        options["prompts"] = _lines(prompts)
    if batch_size is not None:
        options["batch_size"] = batch_size
    if "dtype" in options:
        options["dtype"] = _dtype(options["dtype"])
    measured = evaluate_pipeline(
        model, reference, data, device=device, resume=resume, command=shlex.join(words), **options
    )
    if plot is not None:
        from hf_quant.pages.plots import save_png, timestep_figure

        if measured.sqnr is None:
            raise ConfigError("--plot draws the error against full precision: name it with --reference")
        save_png(timestep_figure({_shown(model): (measured.timesteps, measured.sqnr)}), plot)
    return measured


def classifier_beside(*pipelines: str | None) -> Path | None:
    """The one image classifier of transformers in a folder beside these; None: there is none, or more than one."""
    found = {
        config.parent.resolve()
        for pipeline in pipelines
        if pipeline is not None and Path(pipeline).is_dir()
        for config in Path(pipeline).resolve().parent.glob("*/config.json")
        if "ForImageClassification" in config.read_text(encoding="utf-8", errors="replace")
    }
    return found.pop() if len(found) == 1 else None


def _dtype(name: str) -> "torch.dtype":
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"--dtype {name}: float32, bfloat16 or float16")
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from None
    if not any(lines):
        raise ConfigError(f"--prompts {path} holds no prompts: one a line")
    return [line for line in lines if line]


def _shown(value: object) -> str:
    named = isinstance(value, str | Path) and Path(value).exists()
    return Path(str(value)).absolute().name if named else str(value)


def rows(found: "PipelineEvaluation") -> list[tuple[str, Any]]:
    """What was measured, as lines for people; None for what was not."""
    sqnr = found.sqnr
    curve = None if sqnr is None else f"{sqnr[0]:.1f} dB at first, {sqnr[-1]:.1f} at last, least {min(sqnr):.1f}"
    drift = None if found.trajectory is None else f"{found.trajectory[-1]:.3g} mean squared at the last step"
    psnr = None if found.psnr is None else f"{found.psnr:.2f} dB"
    error = "" if found.psnr_error is None else f" ± {found.psnr_error:.2f}"
    bits = None if found.bits_per_weight is None else f"{found.bits_per_weight:.3f}"
    disk = "" if found.bytes_on_disk is None else f", {size(found.bytes_on_disk)} on disk"
    return [
        ("SQNR of the network", curve),
        ("PSNR to full precision", None if psnr is None else psnr + error),
        ("trajectory", drift),
        ("read by", found.classifier),
        ("class accuracy", _beside(found.accuracy, found.reference_accuracy, "{:.1f} %")),
        ("reads as full precision's", None if found.agreement is None else f"{found.agreement:.1f} %"),
        (
            "Fréchet distance to real pictures",
            _beside(found.frechet_to_data, found.reference_frechet_to_data, "{:.3f}"),
        ),
        ("Fréchet distance to full precision's", _beside(found.frechet_to_reference, None, "{:.3f}")),
        ("true bits per weight", bits),
        ("size", f"{size(found.stored_bytes)} of tensors{disk}"),
        ("peak memory", f"{size(found.peak_bytes)} ({found.peak_holds})"),
        ("seconds per image", _beside(found.seconds_per_image, found.reference_seconds_per_image, "{:.3f}")),
        ("on", f"{found.images} images of {found.steps} steps, {found.batch_size} at a time"),
        ("where", f"{found.device}, {found.dtype}"),
    ]


def _beside(value: float | None, reference: float | None, form: str) -> str | None:
    if value is None:
        return None
    full = "" if reference is None else f" (full precision: {form.format(reference)})"
    return form.format(value) + full
