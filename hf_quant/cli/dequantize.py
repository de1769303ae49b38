"""`hf-quant dequantize`: back to a plain float checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_quant.cli import options as o
from hf_quant.cli.folder import copy_side_files, output_folder
from hf_quant.cli.output import Json, pairs, show, size

if TYPE_CHECKING:
    from rich.console import Console


def command(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new, or empty.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights; auto: what the model computes in.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write a quantized model as a plain float one.

    Every weight is the value it was rounded to, so loading the result needs no hf-quant.

    The result runs anywhere and gives the quantized model's outputs up to rounding in the float type; it does not
    bring back the weights that were there before quantization.

    [bold]Examples[/]

    \b
      hf-quant dequantize OUT PLAIN
      hf-quant dequantize OUT PLAIN --dtype float32
    """
    from hf_quant.api import dequantize
    from hf_quant.loading import load_model, load_processor, read_config, require_ours, torch_dtype

    require_ours(read_config(model), model)
    wanted = None if dtype == "auto" else torch_dtype(dtype)
    with output_folder(out) as work:
        plain: Any = dequantize(load_model(model), wanted)
        plain.save_pretrained(work.model)
        if Path(model).is_dir():
            copy_side_files(Path(model), work.model)
        elif (processor := load_processor(model)) is not None:
            processor.save_pretrained(work.model)
    summary = {"out": str(out), "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors"))}
    show(summary, as_json, lambda console: _draw(console, summary))


def _draw(console: "Console", summary: dict[str, Any]) -> None:
    pairs(console, [("saved to", summary["out"]), ("size", size(summary["bytes"]))])
