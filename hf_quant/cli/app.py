"""The typer application: the commands by name."""

import sys
from collections.abc import Callable
from functools import wraps

import typer

from hf_quant.cli import (
    card,
    dequantize,
    doctor,
    estimate,
    evaluate,
    explain,
    finetune,
    inspect,
    leaderboard,
    methods,
    quantize,
    tune,
)

app = typer.Typer(
    name="hf-quant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def _about() -> None:
    """Quantize Hugging Face models: one command in, a folder out that plain `from_pretrained` loads.

    [bold]First steps[/]

    \b
      hf-quant methods                                      [dim]what there is[/]
      hf-quant estimate MODEL --method gptq --bits 4        [dim]how big it will be[/]
      hf-quant quantize MODEL OUT --method gptq --bits 4 --calibration texts.txt
      hf-quant evaluate OUT texts.txt --reference MODEL     [dim]how good it is[/]
      hf-quant leaderboard MODEL texts.txt OUT              [dim]which method is best[/]
      hf-quant doctor MODEL texts.txt                       [dim]why it is not good[/]

    MODEL is a folder, or a Hub id such as [bold]user/name[/]. Nothing is downloaded unless you name a Hub id.
    """


def _interruptible(function: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C ends a command with one line and the exit code shells expect."""

    @wraps(function)
    def call(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; finished work is kept, the same command goes on from there\n")
            raise typer.Exit(130) from None

    return call


for _module in (
    quantize,
    finetune,
    evaluate,
    inspect,
    explain,
    methods,
    estimate,
    dequantize,
    card,
    leaderboard,
    doctor,
    tune,
):
    app.command(_module.__name__.rpartition(".")[2])(_interruptible(_module.command))
