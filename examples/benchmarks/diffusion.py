"""Quantized diffusion pipelines beside full precision: method x setting x metric, and the error against t.

Every row quantizes an embedded pipeline on its own trajectories, then draws pictures from noise that no calibration
saw; a seed changes both. Peers are backends of diffusers, where they are installed (`_diffusion_peers.py`).
Rows that are kept are not measured again; the table and the plots of `plugins/diffusion` are made of them alone.

    python examples/benchmarks/diffusion.py                       # measure what is missing, then write
    python examples/benchmarks/diffusion.py --methods tfmq-dm --pipelines digits-unet --settings W4A8 --seeds 0
    python examples/benchmarks/diffusion.py --methods             # only write
"""

import argparse
import io
import json
import statistics
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _diffusion_peers import DISTRIBUTIONS, PEERS, offers, quantized

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.drawing import backbone
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.measure.evaluate_pipeline import evaluate_pipeline
from hf_quant.measure.evaluation import PipelineEvaluation
from hf_quant.pages.plots import save_png, timestep_figure
from hf_quant.running.resources import versions
from hf_quant.testing.bench import pictures

HERE = Path(__file__).resolve().parent
MODELS, KEPT = HERE.parent / "models", HERE / "results" / "diffusion.json"
README = HERE.parents[1] / "plugins" / "diffusion" / "README.md"
BEGIN, END = "<!-- diffusion.py: begin -->", "<!-- diffusion.py: end -->"
SETTINGS: dict[str, dict[str, int]] = {  # A16: inputs are not rounded
    "W8A16": {"bits": 8},
    "W4A16": {"bits": 4},
    "W8A8": {"bits": 8, "act_bits": 8},
    "W4A8": {"bits": 4, "act_bits": 8},
    "W4A4": {"bits": 4, "act_bits": 4},
}
DRAWN = {"digits-unet": {}, "digits-dit": {"class_labels": range(10), "guidance": 1.5}}
WEIGHTS_ALONE = {  # in groups as the other methods have them
    "rtn": {"group_size": 64},
    "gptq": {"group_size": 64},
    "brecq": {"group_size": 64, "steps": 150},
}
METHODS = {  # what is not the method's default, so that a row takes minutes on one core
    **WEIGHTS_ALONE,
    "int8-default": {},
    "dynamic-w8a8": {},
    "ptq4dm": {},
    "tdq": {},
    "qdrop": {"steps": 150},
    "q-diffusion": {},
    "tfmq-dm": {"iterations": 500},
    "tfm-framework": {"iterations": 250},
    "svdquant": {"rank": 4},  # where layers are 64 to 128 wide, the branch of rank 32 alone takes 21 bits a weight
}
NOISE = 50_000  # seed of the first picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *PEERS])
    parser.add_argument("--pipelines", nargs="*", default=list(DRAWN))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=60)
    asked = parser.parse_args()
    kept = {(r["pipeline"], r["method"], r["setting"], r["seed"]) for r in read()}
    for key in product(asked.pipelines, asked.methods, asked.settings, asked.seeds):
        if key not in kept and has(*key[1:3]):
            row = measure(*key, asked.images)
            KEPT.write_text(json.dumps(sorted([*read(), row], key=order), indent=1) + "\n")
    write(read())


def read() -> list[dict]:
    return json.loads(KEPT.read_text()) if KEPT.is_file() else []


def has(method: str, setting: str) -> bool:
    """Whether a method has a setting: some round inputs and some do not; a peer has to be installed."""
    if method in PEERS:
        return offers(method, setting)
    return (method in WEIGHTS_ALONE) == ("act_bits" not in SETTINGS[setting])


def order(row: dict) -> tuple:
    every = [*METHODS, *PEERS]
    method = every.index(row["method"]) if row["method"] in every else len(every)
    return row["pipeline"], list(SETTINGS).index(row["setting"]), method, row["method"], row["seed"]


def measure(name: str, method: str, setting: str, seed: int, images: int) -> dict:
    """A row; of a peer that fails, at loading or at running, one with its error."""
    row = {"pipeline": name, "method": method, "setting": setting, "seed": seed}
    try:
        row |= judged(name, method, setting, seed, images)
    except Exception as error:
        if method not in PEERS:
            raise
        row |= {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    print({k: v for k, v in row.items() if k != "evaluation"}, flush=True)
    return row | {"versions": installed(method)}


def judged(name: str, method: str, setting: str, seed: int, images: int) -> dict[str, Any]:
    """What is measured of it."""
    real = pictures(np.load(HERE.parent / "data" / "digits.npz")["test"]).permute(0, 2, 3, 1) / 2 + 0.5
    began = time.perf_counter()
    pipeline, arguments = made(name, method, setting, seed)
    seconds = time.perf_counter() - began
    found = evaluate_pipeline(
        pipeline, MODELS / name, real, classifier=MODELS / "digits-vit", images=images, batch_size=20,
        seed=NOISE + 1000 * seed, progress=False, **DRAWN[name],
    )  # fmt: skip
    print(f"PSNR {found.psnr:.2f}, {found.accuracy} of {found.reference_accuracy} %,", end=" ")
    print(f"Fréchet {found.frechet_to_data:.2f} of {found.reference_frechet_to_data:.2f}", flush=True)
    row = {"quantize_seconds": round(seconds, 2), "backbone_bytes": stored(backbone(pipeline))}
    return {**row, "arguments": arguments, "evaluation": found.to_json()}


def made(name: str, method: str, setting: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The quantized pipeline, and the arguments that the method was given."""
    if method in PEERS:
        return quantized(method, setting, MODELS / name), {}
    pipeline = load_pipeline(MODELS / name)
    config = QuantConfig(method, seed=seed, allow=["*"], **SETTINGS[setting], **METHODS.get(method, {}))
    hf_quant.quantize(pipeline, config, pictures=0, progress=False, **DRAWN[name])
    return pipeline, config.given


def installed(method: str) -> dict[str, str]:
    """Versions of what took part."""
    return versions() | ({method: version(DISTRIBUTIONS[method])} if method in PEERS else {})


def stored(network: torch.nn.Module) -> int:
    """Bytes of what is saved of it, codes, scales and branches included."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell()


def spread(values: list[float | None], form: str) -> str:
    there = [v for v in values if v is not None]
    if len(there) < len(values) or not there:
        return "not measured"
    error = f" ± {form.replace('+', '').format(statistics.stdev(there))}" if len(there) > 1 else ""
    return form.format(statistics.fmean(there)) + error


def beside(values: list[float | None], full: list[float | None]) -> list[float | None]:
    """By how many percent each is above full precision's."""
    return [None if v is None or f is None else 100 * (v / f - 1) for v, f in zip(values, full, strict=True)]


COLUMNS = "setting, method, bits, MB, SQNR (dB), worst step, PSNR (dB), x_0 error, read alike (%), right class (%)"
COLUMNS += ", Fréchet to data, over full precision's (%), s / image, peak MB, s to quantize, seeds x pictures"


def cells(rows: list[dict]) -> list[str]:
    """A line of the table: one method at one setting."""
    found = [PipelineEvaluation.from_json(r["evaluation"]) for r in rows]
    right = spread([f.accuracy for f in found], "{:.1f}") if found[0].accuracy is not None else "no classes"
    frechet, full = [f.frechet_to_data for f in found], [f.reference_frechet_to_data for f in found]
    bits = [None if rows[0]["method"] in PEERS else f.bits_per_weight for f in found][:1]
    return [
        rows[0]["setting"],
        rows[0]["method"],
        "-" if bits == [None] else spread(bits, "{:.2f}"),
        spread([r["backbone_bytes"] / 1e6 if "backbone_bytes" in r else None for r in rows][:1], "{:.2f}"),
        spread([statistics.fmean(f.sqnr or ()) for f in found], "{:.1f}"),
        spread([min(f.sqnr or ()) for f in found], "{:.1f}"),
        spread([f.psnr for f in found], "{:.1f}"),
        spread([f.trajectory[-1] if f.trajectory else None for f in found], "{:.4f}"),
        spread([f.agreement for f in found], "{:.1f}"),
        right,
        spread(frechet, "{:.1f}"),
        spread(beside(frechet, full), "{:+.1f}"),
        spread([f.seconds_per_image for f in found], "{:.2f}"),
        spread([f.peak_bytes / 1e6 for f in found][:1], "{:.0f}"),
        spread([r["quantize_seconds"] for r in rows], "{:.0f}"),
        f"{len(rows)} x {found[0].images}",
    ]


def write(rows: list[dict]) -> None:
    columns, lines = COLUMNS.split(", "), []
    refused, rows = [r for r in rows if "error" in r], [r for r in rows if "error" not in r]
    for name in dict.fromkeys(r["pipeline"] for r in rows):
        mine = [r for r in rows if r["pipeline"] == name]
        lines += [f"### {name}", "", f"| {' | '.join(columns)} |", "|---|---" + "|---:" * (len(columns) - 2) + "|"]
        for setting, method in dict.fromkeys((r["setting"], r["method"]) for r in mine):
            of = [r for r in mine if (r["setting"], r["method"]) == (setting, method)]
            lines.append(f"| {' | '.join(cells(of))} |")
        full = list({r["seed"]: PipelineEvaluation.from_json(r["evaluation"]) for r in mine}.values())
        right = "" if full[0].reference_accuracy is None else "right class "
        right += "" if not right else spread([f.reference_accuracy for f in full], "{:.1f}") + " %, "
        distance = spread([f.reference_frechet_to_data for f in full], "{:.1f}")
        seconds = spread([f.reference_seconds_per_image for f in full], "{:.2f}")
        lines += ["", f"Full precision: {right}Fréchet distance to the data {distance}, {seconds} s / image.", ""]
        for setting in dict.fromkeys(r["setting"] for r in mine if "act_bits" in SETTINGS[r["setting"]]):
            picture = KEPT.with_name(f"diffusion-{name}-{setting}.png")
            save_png(curves([r for r in mine if r["setting"] == setting]), picture)
            place = f"../../examples/benchmarks/results/{picture.name}"
            lines += [f"![SQNR against t, {name}, {setting}]({place})", ""]
    failed: dict[tuple[str, str], list[str]] = {}
    for r in refused:
        failed.setdefault((r["method"], r["error"]), []).append(f"{r['pipeline']} at {r['setting']}")
    lines += [f"- {peer} does not run {', '.join(where)}: {error}" for (peer, error), where in failed.items()]
    lines += [""] if failed else []
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text("\n".join([before + BEGIN, heading(rows), "", *lines, END]) + rest.partition(END)[2], "utf-8")


def heading(rows: list[dict]) -> str:
    """What rows have in common, and which arguments of which are not their defaults."""
    places: dict[str, dict[str, list[str]]] = {}
    for r in rows:
        given = ", ".join(f"{k}={v}" for k, v in r["arguments"].items() if k not in ("bits", "act_bits"))
        where = places.setdefault(r["method"], {}).setdefault(given, [])
        where += [] if (place := f"{r['pipeline']} at {r['setting']}") in where else [place]
    shortened = [
        f"{method} with {given}" + (f" ({', '.join(where)})" if len(found) > 1 else "")
        for method, found in sorted(places.items())
        for given, where in found.items()
        if given
    ]
    text = "Pictures of 20 steps; ± is the deviation of seeds."
    return text + (f" Not their defaults: {'; '.join(shortened)}." if shortened else "")


def curves(rows: list[dict]) -> Any:  # noqa: ANN401  a matplotlib Figure
    """The mean over seeds of each method's SQNR at every timestep."""
    series = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        found = [r["evaluation"] for r in rows if r["method"] == method]
        series[method] = (
            found[0]["timesteps"],
            [statistics.fmean(v) for v in zip(*(f["sqnr"] for f in found), strict=True)],
        )
    return timestep_figure(series)


if __name__ == "__main__":
    main()
