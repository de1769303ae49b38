"""Quantized diffusion pipelines beside full precision: method x setting, three seeds, and the error against t.

Every row quantizes an embedded pipeline on its own trajectories, then draws pictures from noise that no calibration
saw.
A seed changes both. Rows that are kept are not measured again; the table and the plot are made of them alone.

    python examples/benchmarks/diffusion.py                       # measure what is missing, then write
    python examples/benchmarks/diffusion.py --methods tfmq-dm --pipelines digits-unet
    python examples/benchmarks/diffusion.py --methods             # only write
"""

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

import numpy as np

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.measure.evaluate_pipeline import evaluate_pipeline
from hf_quant.measure.evaluation import PipelineEvaluation
from hf_quant.pages.plots import save_png, timestep_figure
from hf_quant.running.resources import versions
from hf_quant.testing.bench import pictures

HERE = Path(__file__).resolve().parent
MODELS, KEPT, README = HERE.parent / "models", HERE / "results" / "diffusion.json", HERE / "README.md"
BEGIN, END = "<!-- diffusion.py: begin -->", "<!-- diffusion.py: end -->"
SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
DRAWN = {"digits-unet": {}, "digits-dit": {"class_labels": range(10), "guidance": 1.5}}
METHODS = ("int8-default", "dynamic-w8a8", "tfmq-dm")  # any other that takes bits and act_bits: --methods
NOISE = 50_000  # seed of the first picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--pipelines", nargs="*", default=list(DRAWN))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=24)
    asked = parser.parse_args()
    rows = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    kept = {(r["pipeline"], r["method"], r["setting"], r["seed"]) for r in rows}
    for key in product(asked.pipelines, asked.methods, asked.settings, range(asked.seeds)):
        if key not in kept:
            rows.append(measure(*key, asked.images))
            KEPT.write_text(json.dumps(sorted(rows, key=order), indent=1) + "\n")
    write(sorted(rows, key=order))


def order(row: dict) -> tuple:
    method = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    return row["pipeline"], list(SETTINGS).index(row["setting"]), method, row["method"], row["seed"]


def measure(name: str, method: str, setting: str, seed: int, images: int) -> dict:
    bits, act_bits = SETTINGS[setting]
    real = pictures(np.load(HERE.parent / "data" / "digits.npz")["test"]).permute(0, 2, 3, 1) / 2 + 0.5
    pipeline = load_pipeline(MODELS / name)
    config = QuantConfig(method, bits=bits, act_bits=act_bits, seed=seed, allow=["*"])
    began = time.perf_counter()
    hf_quant.quantize(pipeline, config, pictures=0, progress=False, **DRAWN[name])
    seconds = time.perf_counter() - began
    found = evaluate_pipeline(
        pipeline, MODELS / name, real, classifier=MODELS / "digits-vit", images=images, seed=NOISE + 1000 * seed,
        **DRAWN[name],
    )  # fmt: skip
    row = {"pipeline": name, "method": method, "setting": setting, "seed": seed, "quantize_seconds": round(seconds, 2)}
    print(row, f"PSNR {found.psnr:.2f}", flush=True)
    return {**row, "arguments": config.given, "evaluation": found.to_json(), "versions": versions()}


def spread(values: list[float | None], form: str) -> str:
    there = [v for v in values if v is not None]
    if len(there) < len(values):
        return "not measured"
    error = f" ± {form.format(statistics.stdev(there))}" if len(there) > 1 else ""
    return form.format(statistics.fmean(there)) + error


def write(rows: list[dict]) -> None:
    lines, images = [], {r["evaluation"]["images"] for r in rows}
    for name in dict.fromkeys(r["pipeline"] for r in rows):
        lines += [f"### {name}", ""]
        columns = ["setting", "method", "bits", "SQNR, dB", "least of a step", "PSNR, dB", "x_0 error", "read alike, %"]
        columns += ["right class, %", "Fréchet, pictures", "Fréchet, data", "s / image", "s to quantize", "seeds"]
        lines += [f"| {' | '.join(columns)} |", "|---|---" + "|---:" * (len(columns) - 2) + "|"]
        mine = [r for r in rows if r["pipeline"] == name]
        full = [PipelineEvaluation.from_json(r["evaluation"]) for r in mine]
        for setting, method in dict.fromkeys((r["setting"], r["method"]) for r in mine):
            of = [r for r in mine if (r["setting"], r["method"]) == (setting, method)]
            found = [PipelineEvaluation.from_json(r["evaluation"]) for r in of]
            cells = [setting, method, spread([f.bits_per_weight for f in found][:1], "{:.2f}")]
            cells += [
                spread([statistics.fmean(f.sqnr or ()) for f in found], "{:.1f}"),
                spread([min(f.sqnr or ()) for f in found], "{:.1f}"),
                spread([f.psnr for f in found], "{:.1f}"),
                spread([f.trajectory[-1] if f.trajectory else None for f in found], "{:.4f}"),
                spread([f.agreement for f in found], "{:.0f}"),
                spread([f.accuracy for f in found], "{:.0f}") if found[0].accuracy is not None else "no classes",
                spread([f.frechet_to_reference for f in found], "{:.2f}"),
                spread([f.frechet_to_data for f in found], "{:.1f}"),
                spread([f.seconds_per_image for f in found], "{:.2f}"),
                spread([r["quantize_seconds"] for r in of], "{:.0f}"),
                str(len(of)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        reference = spread([f.reference_frechet_to_data for f in full], "{:.1f}")
        right = spread([f.reference_accuracy for f in full], "{:.0f}") + " % right class, "
        right = "" if full[0].reference_accuracy is None else right
        seconds = spread([f.reference_seconds_per_image for f in full], "{:.2f}")
        lines += ["", f"Full precision: {right}Fréchet distance to the data {reference}, {seconds} s / image.", ""]
        for setting in dict.fromkeys(r["setting"] for r in mine):
            picture = KEPT.with_name(f"diffusion-{name}-{setting}.png")
            save_png(curves([r for r in mine if r["setting"] == setting]), picture)
            lines += [f"![SQNR against t, {name}, {setting}](results/{picture.name})", ""]
    words = (
        f"Each row is {' or '.join(map(str, sorted(images)))} pictures of 20 steps a seed; ± is the deviation of seeds."
    )
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    made = "\n".join([BEGIN, words, "", *lines, END])
    README.write_text(before + made + after, encoding="utf-8")


def curves(rows: list[dict]):
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
