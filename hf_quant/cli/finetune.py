"""`hf-quant finetune`: as `quantize`, by a method that trains."""

from pathlib import Path
from typing import Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli import quantize
from hf_quant.cli.output import Json

Device = Annotated[
    str | None, typer.Option("--device", help="Where the model is trained, such as cuda:0. Default: the CPU.")
]


def command(
    model: o.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new, or empty.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="What to train on: texts, a folder, or ids (.npy).")],
    method: o.Method = "lr-qat",
    bits: o.Bits = None,
    budget: o.Budget = None,
    group_size: o.GroupSize = None,
    settings: o.Settings = None,
    skip: o.Skip = None,
    overrides: o.Overrides = None,
    allow: o.Allow = None,
    seed: o.Seed = 0,
    device: Device = None,
    dtype: quantize.Dtype = "auto",
    evaluate: quantize.Evaluate = None,
    as_json: Json = False,
) -> None:
    """Quantize a model by training it, and save it.

    The full-precision model is the teacher (--set distill=0: the texts alone). What was trained ends in packed codes,
    and how far their logits are from those of the trained model is told. After Ctrl-C or a crash the same command goes
    on from the last checkpoint.

    [bold]Examples[/]

    \b
      hf-quant finetune MODEL OUT texts.txt -b 3 --set steps=500
      hf-quant finetune MODEL OUT ids.npy -m lsq -b 2 -g 32 -e held-out.txt
      hf-quant finetune MODEL OUT texts.jsonl --device cuda:0 --set gradient_checkpointing=true --set samples=4096
    """
    from hf_quant.errors import NotSupported
    from hf_quant.recipe import HOW_TO_TRAIN, Recipe

    config = o.make_config(method, bits, group_size, settings, skip, overrides, allow, seed, budget=budget)
    quantizer = config.quantizer()
    if isinstance(quantizer, Recipe) and quantizer.trainer is None:
        raise NotSupported(f"method {method!r} does not train; {HOW_TO_TRAIN}")
    quantize.command(
        model,
        out,
        method=method,
        bits=bits,
        budget=budget,
        group_size=group_size,
        calibration=data,
        settings=settings,
        skip=skip,
        overrides=overrides,
        allow=allow,
        seed=seed,
        device=device,
        dtype=dtype,
        evaluate=evaluate,
        as_json=as_json,
    )
