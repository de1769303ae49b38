"""`hf-quant finetune`: as `quantize`, by a method that trains."""

from pathlib import Path
from typing import Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli import quantize
from hf_quant.cli.output import Json


def command(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new, or empty.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="What to train on: texts, a folder, or ids (.npy).")],
    method: o.Method = "lr-qat",
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    settings: o.Settings = None,
    skip: o.Skip = None,
    overrides: o.Overrides = None,
    allow: o.Allow = None,
    seed: o.Seed = 0,
    dtype: quantize.Dtype = "auto",
    evaluate: quantize.Evaluate = None,
    as_json: Json = False,
) -> None:
    """Quantize a model by training it, and save it.

    The full-precision model is the teacher. After Ctrl-C or a crash the same command goes on from the last checkpoint.

    [bold]Examples[/]

    \b
      hf-quant finetune MODEL OUT texts.txt -b 3 --set steps=500
      hf-quant finetune MODEL OUT ids.npy -m lsq -b 2 -g 32 -e held-out.txt
    """
    from hf_quant.errors import NotSupported
    from hf_quant.recipe import HOW_TO_TRAIN, Recipe

    quantizer = o.make_config(method, bits, group_size, settings, skip, overrides, allow, seed).quantizer()
    if isinstance(quantizer, Recipe) and quantizer.trainer is None:
        raise NotSupported(f"method {method!r} does not train; {HOW_TO_TRAIN}")
    quantize.command(
        model,
        out,
        method=method,
        bits=bits,
        group_size=group_size,
        calibration=data,
        settings=settings,
        skip=skip,
        overrides=overrides,
        allow=allow,
        seed=seed,
        dtype=dtype,
        evaluate=evaluate,
        as_json=as_json,
    )
