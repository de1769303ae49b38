"""`hf-quant evaluate`: how good a quantized model is, measured."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import evaluate_pipeline as pictures
from hf_quant.cli import options as o
from hf_quant.cli.output import Json, pairs, show, size
from hf_quant.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from hf_quant.measure.evaluation import Evaluation

WINDOW = 512
TOKENS = 32768


def command(
    model: o.Model,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Texts (.txt .jsonl .parquet, a folder) or ids (.npy); for a pipeline a folder of real pictures, or "
            "nothing.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", "-r", metavar="MODEL", help="The full-precision original; without it there is no KL."
        ),
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens in a window; fewer if the model takes fewer.")
    ] = WINDOW,
    tokens: Annotated[int, typer.Option("--tokens", help="How many to run at most.")] = TOKENS,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Windows a forward pass.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to run, such as cuda:0.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Grows by a line a batch; a killed run goes on.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            "--classifier",
            metavar="MODEL",
            help="Pipelines: who reads the pictures. Default: the one image classifier in a folder beside theirs.",
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", help="Pipelines by class: draw the first so many. Default: all it reads.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Pipelines from texts: one prompt a line.")
    ] = None,
    images: Annotated[int | None, typer.Option("--images", help="Pipelines: how many to draw. Default: 64.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Pipelines: of denoising. Default: 20.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Pipelines: scale of guidance.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Pipelines: what to compute in. Default: float32.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Pipelines: draw the error against the timestep.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how good a quantized model is.

    Of a language model: KL to full precision, agreement, perplexity, true bits, size, memory and speed. Of a pipeline
    of diffusers: SQNR at every timestep, trajectories and PSNR at equal seeds, what a classifier reads, and the costs.

    The mean KL over tokens is the honest number: it says how far the quantized model's next-token distribution is
    from the original's. Perplexity alone hides changes that cancel.

    [bold]Examples[/]

    \b
      hf-quant evaluate OUT held-out.txt --reference MODEL
      hf-quant evaluate OUT ids.npy -r MODEL --tokens 8192 --json > quality.json
      hf-quant evaluate MODEL held-out.txt                 [dim]perplexity of any model[/]
      hf-quant evaluate OUT --reference PIPELINE --classifier VIT --plot error.png
    """
    from hf_quant.diffusion.loading_pipeline import draws
    from hf_quant.loading import load_model, load_processor, resolve

    asked = pictures.Asked(
        classifier=classifier,
        classes=classes,
        prompts=prompts,
        images=images,
        steps=steps,
        guidance=guidance,
        dtype=dtype,
        plot=plot,
    )
    if draws(model):
        drawn = pictures.measure(model, reference, data, asked, batch_size=batch_size, device=device, resume=resume)
        show(drawn.to_json(), as_json, lambda console: pairs(console, pictures.rows(drawn)))
        return
    asked.refuse()
    if data is None:
        resolve(model)
        raise ConfigError(f"name what to measure on: hf-quant evaluate {model} held-out.txt")
    options: dict[str, Any] = {"window": window, "tokens": tokens, "batch_size": batch_size, "device": device}
    loaded, processor = load_model(model), load_processor(model)
    found = measure(loaded, model, reference, data, processor=processor, resume=resume, **options)
    show(found.to_json(), as_json, lambda console: pairs(console, rows(found)))


def measure(
    model: "nn.Module",
    name: str,
    reference: str | None,
    data: Path,
    *,
    processor: Any,  # noqa: ANN401  a tokenizer
    resume: Path | None,
    window: int = WINDOW,
    tokens: int = TOKENS,
    batch_size: int | None = None,
    device: str | None = None,
) -> "Evaluation":
    """`evaluate.evaluate` with windows that fit the model; the card will say `name`, never a path of this machine."""
    from hf_quant.data.calibration import context_length
    from hf_quant.loading import resolve
    from hf_quant.measure.evaluate import evaluate
    from hf_quant.measure.reference_logits import INDEX

    if reference is not None and not (Path(reference) / INDEX).is_file():
        reference = resolve(reference)
    window = min(window, context_length(model) or window)
    words = ["hf-quant", "evaluate", _shown(name), _shown(data)]
    words += [] if reference is None else ["--reference", _shown(reference)]
    words += [] if window == WINDOW else ["--window", str(window)]
    words += [] if tokens == TOKENS else ["--tokens", str(tokens)]
    return evaluate(
        model,
        reference,
        data,
        processor=processor,
        window=window,
        tokens=tokens,
        batch_size=batch_size,
        device=device,
        resume=resume,
        command=shlex.join(words),
    )


def _shown(name: str | Path) -> str:
    return Path(name).absolute().name if Path(name).exists() else str(name)


def rows(found: "Evaluation") -> list[tuple[str, Any]]:
    """What was measured, as lines for people; None for what was not."""
    return [
        ("KL to full precision", _with_error(found.kl, found.kl_error, "{:.5f}", " nats a token")),
        ("top-1 agreement", _with_error(found.top1, found.top1_error, "{:.2f}", " %")),
        ("perplexity", _with_error(found.perplexity, found.perplexity_error, "{:.3f}", "")),
        ("of the reference", _with_error(found.reference_perplexity, None, "{:.3f}", "")),
        ("loss increase", _with_error(found.loss_increase, found.loss_increase_error, "{:.5f}", " nats a token")),
        ("true bits per weight", _with_error(found.bits_per_weight, None, "{:.3f}", "")),
        ("on disk", None if found.bytes_on_disk is None else size(found.bytes_on_disk)),
        ("peak memory", f"{size(found.peak_bytes)} ({found.peak_holds})"),
        ("speed", f"{found.tokens_per_second:.0f} tokens/s ({found.device}, {found.dtype}, batch {found.batch_size})"),
        ("on", f"{found.windows} windows of {found.window} tokens of {found.data}"),
    ]


def _with_error(value: float | None, error: float | None, form: str, unit: str) -> str | None:
    if value is None:
        return None
    return form.format(value) + ("" if error is None else " ± " + form.format(error)) + unit
