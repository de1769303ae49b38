"""`hf-quant quantize`: a model in, a quantized model out."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.evaluate import measure, rows
from hf_quant.cli.folder import Workplace, copy_side_files, output_folder
from hf_quant.cli.output import Json, pairs, show, size

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.config import QuantConfig
    from hf_quant.report import Report

Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="FILE",
        help="Texts (.txt .jsonl .parquet, a folder), ids (.npy), or the model's inputs by name (.safetensors).",
    ),
]
Evaluate = Annotated[
    Path | None,
    typer.Option("--evaluate", "-e", metavar="DATA", help="Then measure it against MODEL on this; goes on the card."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Where one block at a time is computed, such as cuda:0. Default: CPU.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of what stays in floating point; auto: as saved.")]


def command(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new, or empty.")],
    method: o.Method = "rtn",
    bits: o.Bits = None,
    budget: o.Budget = None,
    group_size: o.GroupSize = None,
    calibration: Calibration = None,
    settings: o.Settings = None,
    skip: o.Skip = None,
    overrides: o.Overrides = None,
    allow: o.Allow = None,
    seed: o.Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    evaluate: Evaluate = None,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it.

    OUT gets the packed model, its tokenizer, a report and a model card.

    OUT appears only when it is complete. Until then the work is in OUT.partial: after Ctrl-C, a crash or a full
    disk the same command goes on where it was, with the same bytes in the end. Load the result with plain
    `from_pretrained(OUT)`.

    [bold]Examples[/]

    \b
      hf-quant quantize MODEL OUT                                [dim]rtn: 4 bits, no data needed[/]
      hf-quant quantize MODEL OUT -m gptq -b 4 -g 128 -c texts.txt -e held-out.txt
      hf-quant quantize MODEL OUT -m gptq -b 3 -c ids.npy --set damp=0.05 --set act_order=true
      hf-quant quantize MODEL OUT -m gptq --budget '3.2 bits' -c texts.txt
      hf-quant quantize MODEL OUT --skip '*.layers.0.*' --override '*.down_proj=bits=8'
      hf-quant quantize user/name OUT -m awq -c texts.txt --device cuda:0
    """
    from hf_quant.loading import load_processor, read_config, require_float

    given = (method, bits, group_size, settings, skip, overrides, allow, seed)
    o.make_config(*given, budget=budget)  # a wrong option is told before anything is read or written
    require_float(read_config(model), model)
    processor = load_processor(model)
    with output_folder(out) as work:
        config = o.make_config(
            *given, budget=budget, calibration=calibration, processor=processor, device=device, run_dir=work.run
        )
        report = _quantize(model, config, work, dtype, processor, evaluate)
    summary = _summary(out, report)
    show(summary, as_json, lambda console: _draw(console, summary))


def _quantize(
    model: str,
    config: "QuantConfig",
    work: Workplace,
    dtype: str,
    processor: Any,  # noqa: ANN401  a tokenizer
    data: Path | None,
) -> "Report":
    from hf_quant.loading import load_model
    from hf_quant.pages.report_html import write

    quantized: Any = load_model(model, config, dtype=dtype)
    quantizer = quantized.hf_quantizer
    if data is not None:
        found = measure(quantized, work.model.name, model, data, processor=processor, resume=work.evaluation)
        quantizer.report = replace(quantizer.report, measured=found.to_json())
    quantized.save_pretrained(work.model)  # with the report and the card
    if Path(model).is_dir():
        copy_side_files(Path(model), work.model)
    elif processor is not None:
        processor.save_pretrained(work.model)
    report: Report = quantizer.report
    if not (work.model / "report.html").exists():  # a network of diffusers is saved without a card
        report.save(work.model / "report.json")
        write(report, work.model / "report.html")
    return report


def _summary(out: Path, report: "Report") -> dict[str, Any]:
    return {
        "out": str(out),
        "method": report.method,
        "bits_per_weight": report.bits_per_weight,
        "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
        "quantized": len(report.quantized),
        "kept": sum(e.status == "kept" for e in report.coverage),
        "unsupported": sum(e.status == "unsupported" for e in report.coverage),
        "seconds": report.seconds,
        "measured": report.measured,
        "training": report.training,
    }


def _draw(console: "Console", summary: dict[str, Any]) -> None:
    from hf_quant.measure.evaluation import Evaluation

    counts = f"{summary['quantized']} quantized, {summary['kept']} kept, {summary['unsupported']} unsupported"
    lines = [
        ("saved to", summary["out"]),
        ("true bits per weight", f"{summary['bits_per_weight']:.3f}"),
        ("size", size(summary["bytes"])),
        ("parameters", f"{counts} (report.html lists each)"),
        ("time", f"{summary['seconds']:.1f} s"),
    ]
    if summary["training"]:
        lines += _training_rows(summary["training"])
    if summary["measured"]:
        lines += rows(Evaluation.from_json(summary["measured"]))[:5]
    pairs(console, [*lines, ("next", f"hf-quant explain {summary['out']}")])


def _training_rows(found: dict[str, float]) -> list[tuple[str, str]]:
    return [
        ("trained", f"{found['steps']:.0f} steps, {found['tokens']:.0f} tokens, {found['seconds']:.0f} s"),
        ("loss", f"{found['first_loss']:.3g} at first, {found['last_loss']:.3g} at last"),
        (
            "packed against trained",
            f"logits differ by at most {found['logit_difference']:.1e} of {found['logits']:.1f}",
        ),
    ]
