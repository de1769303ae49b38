"""`hf-quant tune`: find the fastest way to run a quantized model on the GPU at hand."""

from typing import TYPE_CHECKING, Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, show, table

if TYPE_CHECKING:
    from rich.console import Console


def command(
    model: o.Model,
    device: Annotated[str, typer.Option("--device", help="The GPU it will run on.")] = "cuda",
    dtype: Annotated[str, typer.Option("--dtype", help="What it will compute in; auto: as saved.")] = "auto",
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-t", help="Only for so many tokens at once. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest way to run a quantized model on the GPU at hand.

    Times the configurations of every shape and number of tokens, and keeps the fastest in the cache folder: from then
    on every process on this kind of GPU uses it. What is known is not timed again, so an interrupted run goes on.

    [bold]Examples[/]

    \b
      hf-quant tune OUT
      hf-quant tune OUT -t 1 -t 8                [dim]decoding, one to eight sequences[/]
      hf-quant explain OUT --device cuda         [dim]what runs afterwards[/]
    """
    import torch

    from hf_quant.errors import ConfigError
    from hf_quant.loading import load_model, read_config, require_ours, torch_dtype
    from hf_quant.tuning import tune

    require_ours(read_config(model), model)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"tuning needs the GPU that the model will run on, and there is no {device} here")
    wanted = "auto" if dtype == "auto" else torch_dtype(dtype)
    found = tune(load_model(model, dtype=wanted, device=device), tokens=tokens or ())
    show(found, as_json, lambda console: _draw(console, found))


def _draw(console: "Console", found: dict[str, str]) -> None:
    if not found:
        console.print("all of it was tuned before")
        return
    console.print(table(("shape", "fastest"), list(found.items())))
