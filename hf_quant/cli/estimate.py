"""`hf-quant estimate`: what quantizing would give, before any weight is read."""

from typing import TYPE_CHECKING, Any

from hf_quant.cli import options as o
from hf_quant.cli.output import Json, pairs, show, size

if TYPE_CHECKING:
    from rich.console import Console


def command(
    model: o.Model,
    method: o.Method = "rtn",
    bits: o.Bits = None,
    budget: o.Budget = None,
    group_size: o.GroupSize = None,
    settings: o.Settings = None,
    skip: o.Skip = None,
    overrides: o.Overrides = None,
    allow: o.Allow = None,
    as_json: Json = False,
) -> None:
    """Estimate size, true bits and memory before any work.

    Only config.json is read, so a big model costs nothing.

    Every plan-time check runs too: a glob that matches nothing, a layer nobody can quantize, or a format that
    cannot hold a layer is reported here, before hours of work.

    [bold]Examples[/]

    \b
      hf-quant estimate MODEL --method gptq --bits 3 --group-size 128
      hf-quant estimate MODEL --method rtn --override '*.down_proj=bits=8' --skip '*.layers.0.*'
      hf-quant estimate MODEL --method gptq --budget '3.2 bits'
      hf-quant estimate user/name --json          [dim]a Hub id: only its config.json is fetched[/]
    """
    from hf_quant.api import estimate

    found = estimate(model, o.make_config(method, bits, group_size, settings, skip, overrides, allow, budget=budget))
    show(found, as_json, lambda console: _draw(console, found))


def _draw(console: "Console", found: dict[str, Any]) -> None:
    before, after = found["original_bytes"], found["model_bytes"]
    upper = " at the most" if "lowest" in found else ""
    pairs(
        console,
        [
            ("layers to quantize", found["sites"]),
            ("kept in full precision", found["kept"]),
            ("true bits per weight", f"{found['bits_per_weight']:.3f}{upper}"),
            ("size", f"{size(after)}{upper}, {after / before:.2f} of {size(before)}"),
            *((f"{end} possible", _reach(found[end])) for end in ("lowest", "highest") if end in found),
            ("on the device while quantizing", f"{size(found['device_bytes'])} for the largest block"),
            ("formats", " ".join(found["formats"])),
            ("calibration data", "needed" if found["needs_calibration"] else "not needed"),
        ],
    )


def _reach(end: dict[str, Any]) -> str:
    return f"{end['bits_per_weight']:.3f} bits per weight, {size(end['model_bytes'])}"
