"""`hf-quant doctor`: why quantizing a model costs quality, and where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, pairs, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from hf_quant.measure.doctor import Diagnosis

SHOWN = 12


def command(
    model: o.Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Held-out texts (.txt .jsonl .parquet), ids (.npy), or inputs by name (.safetensors)."
        ),
    ],
    method: o.Method = "rtn",
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    input_bits: Annotated[int, typer.Option("--input-bits", help="Of the layers' inputs, rounded per token.")] = 8,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", metavar="FILE", help="For methods that need it, such as gptq.")
    ] = None,
    sets: Annotated[int, typer.Option("--sets", help="Disjoint calibration sets to compare.")] = 3,
    window: Annotated[int, typer.Option("--window", help="Tokens in a window.")] = 256,
    tokens: Annotated[int, typer.Option("--tokens", help="How many to measure on at most.")] = 1024,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Grows by a line a figure; a killed run goes on.")
    ] = None,
    seed: o.Seed = 0,
    as_json: Json = False,
) -> None:
    """Find out where quantizing a model loses quality.

    Switches weights and inputs on and off: all of them, then each layer alone. Every figure is the KL to full
    precision on held-out data. Then it looks at the inputs themselves (outlier channels), follows the error from
    block to block, repeats the quantization on other calibration data, and says what to do.

    [bold]Examples[/]

    \b
      hf-quant doctor MODEL held-out.txt                            [dim]rtn at 4 bits, 8-bit inputs[/]
      hf-quant doctor MODEL ids.npy -m gptq -b 3 -c calib.npy       [dim]and how much the data matters[/]
      hf-quant doctor VIT images.safetensors                        [dim]a tensor named pixel_values[/]
      hf-quant doctor MODEL ids.npy --input-bits 4 --json | jq -r '.verdict[]'
    """
    from hf_quant.loading import load_model, load_processor, read_config, require_float
    from hf_quant.measure.doctor import diagnose
    from hf_quant.spec import act_spec

    require_float(read_config(model), model)
    processor = load_processor(model)
    config = o.make_config(method, bits, group_size, seed=seed, calibration=calibration, processor=processor)
    found = diagnose(
        load_model(model, dtype="float32"),
        data,
        config,
        inputs=act_spec(input_bits),
        processor=processor,
        window=window,
        tokens=tokens,
        sets=sets,
        resume=resume,
    )
    show(found.to_json(), as_json, lambda console: _draw(console, found))


def _draw(console: "Console", found: "Diagnosis") -> None:
    pairs(
        console,
        [
            ("perplexity in full precision", None if found.perplexity is None else f"{found.perplexity:.3f}"),
            ("KL, everything off", f"{found.off:.2e}"),
            ("KL, weights only", f"{found.weights:.5f}"),
            ("KL, inputs only", f"{found.inputs:.5f}"),
            ("KL, both", f"{found.both:.5f}"),
            (f"KL, both but the worst {len(found.worst)}", f"{found.without_worst:.5f}"),
            ("KL of calibration sets", ", ".join(f"{kl:.5f}" for kl in found.sets)),
        ],
    )
    worst = sorted(found.sites, key=lambda s: -(s.weights + s.inputs))[:SHOWN]
    columns = ("layer, worst first", "weights", "inputs", "peak", "kurtosis", "outliers")
    cells = [
        (s.name, f"{s.weights:.5f}", f"{s.inputs:.5f}", f"{s.peak:.1f}", f"{s.kurtosis:.1f}", len(s.outliers))
        for s in worst
    ]
    console.print()
    console.print(table(columns, cells, numbers=columns[1:]))
    blocks = [(b.name, f"{b.error:.2e}", f"{b.amplification:.2f}" if i else "") for i, b in enumerate(found.blocks)]
    console.print()
    console.print(table(("stream behind", "error", "times"), blocks, numbers=("error", "times")))
    console.print()
    for sentence in found.verdict:
        console.print(f"[bold]-[/] {sentence}", soft_wrap=True)
