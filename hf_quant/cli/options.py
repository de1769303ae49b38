"""The options that name a quantization, shared by `quantize` and `estimate`, and the config they make."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_quant.config import QuantConfig

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or a Hub id (user/name).")]
Method = Annotated[str, typer.Option("--method", "-m", help="Id of a method; `hf-quant methods` lists them.")]
Bits = Annotated[int | None, typer.Option("--bits", "-b", help="Bits per weight. Default: the method's own.")]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Instead of --bits: how large it may become, bits chosen layer by layer: '3.2 bits' a weight, '6.5 GB' in "
        'all; or JSON such as \'{"size": "3.2 bits", "fused": false}\'.',
    ),
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", "-g", help="Weights sharing a scale; -1: a whole output channel.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the method, such as damp=0.01. Repeatable."),
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", metavar="GLOB", help="Layers to keep in full precision. Repeatable.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="GLOB=NAME=VALUE[,...]",
        help="Other arguments for the layers a glob matches, such as '*.down_proj=bits=8'; GLOB=keep keeps them. "
        "Repeatable; the first match wins.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="GLOB",
        help="Parameters that may stay unsupported, or be rounded to nearest when calibration never reaches them.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything drawn at random.")]


def make_config(
    method: str,
    bits: int | None = None,
    group_size: int | None = None,
    settings: list[str] | None = None,
    skip: list[str] | None = None,
    overrides: list[str] | None = None,
    allow: list[str] | None = None,
    seed: int = 0,
    *,
    budget: str | None = None,
    calibration: Path | None = None,
    processor: Any = None,  # noqa: ANN401  a tokenizer
    device: str | None = None,
    run_dir: Path | None = None,
) -> "QuantConfig":
    """The config these options stand for.

    Raises:
        typer.BadParameter: an option that is not of the form its help shows.
        ConfigError: an unknown method or argument, or a value out of range.
    """
    from hf_quant.config import QuantConfig

    return QuantConfig(
        method,
        bits=bits,
        budget=_budget(budget),
        group_size=group_size,
        calibration=calibration,
        processor=processor,
        skip=tuple(skip or ()),
        overrides=dict(_override(text) for text in overrides or ()),
        allow=tuple(allow or ()),
        seed=seed,
        device=device,
        run_dir=run_dir,
        **dict(_setting(text, "--set") for text in settings or ()),
    )


def _budget(text: str | None) -> Any:  # noqa: ANN401  a size, or a mapping from JSON
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is no JSON: {error}", param_hint="--budget") from None


def _setting(text: str, option: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint=option)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def _override(text: str) -> tuple[str, dict[str, Any] | None]:
    glob, equals, given = text.partition("=")
    if not equals or not glob:
        raise typer.BadParameter(f"{text!r} is not of the form GLOB=NAME=VALUE or GLOB=keep", param_hint="--override")
    if given == "keep":
        return glob, None
    return glob, dict(_setting(part, "--override") for part in given.split(","))
