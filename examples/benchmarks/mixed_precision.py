"""What choosing bits layer by layer gives at a size: budgets beside uniform widths, on one model and one run.

Each model is quantized, saved, loaded back and then measured, as in fidelity.py. Every seed has calibration rows of its
own. `line` is the KL on the straight line between the uniform widths on either side, at the same true bits and seed.

    python mixed_precision.py MODEL CALIBRATION.npy TEST.npy --budgets "2.6445 bits" "3.6523 bits"
"""

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.measure.evaluate import evaluate
from hf_quant.measure.reference_logits import store

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("test", type=Path, help=".npy of token ids [n]")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4], help="uniform widths")
    parser.add_argument("--budgets", nargs="*", default=["2.6445 bits", "3.6523 bits"])
    parser.add_argument("--by", nargs="*", default=["mixed"], help="methods whose sensitivity chooses")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="evaluation tokens")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mixed_precision.json")
    arguments = parser.parse_args()
    calibration = torch.from_numpy(np.load(arguments.calibration)[:, : arguments.window].astype(np.int64))
    test = torch.from_numpy(np.load(arguments.test).astype(np.int64))
    asked: list[dict] = [{"bits": bits} for bits in arguments.bits]
    asked += [{"budget": {"size": size, "by": by}} for size in arguments.budgets for by in arguments.by]
    rows = []
    with tempfile.TemporaryDirectory() as logits:
        original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        store(original, test, logits, window=arguments.window, tokens=arguments.tokens, progress=False)
        for seed in range(arguments.seeds):
            mine = calibration[seed * arguments.rows : (seed + 1) * arguments.rows]
            for given in asked:
                row = {"seed": seed, **measure(arguments, given, mine, test, logits)}
                row |= {} if "bits" in given else {"line": line([r for r in rows if r["seed"] == seed], row)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(arguments, rows)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Markdown, a row a setting: means over seeds, in brackets the lowest and highest KL."""
    lines = ["| asked | true bits | KL | KL on the line | ratio | top-1 % |", "|---|---|---|---|---|---|"]
    settings: dict[str, list[dict]] = {}
    for row in rows:
        asked = f"{row['bits']} bits" if "bits" in row else f"{row['budget']['size']} by {row['budget']['by']}"
        settings.setdefault(asked, []).append(row)
    for asked, of in sorted(settings.items(), key=lambda s: s[1][0]["true_bits"]):
        kls = [row["kl"] for row in of]
        ends = [row["line"] for row in of if row.get("line")]
        spread = f"({min(kls):.5f} ... {max(kls):.5f})"
        beside = f"{fmean(ends):.5f} | {fmean(kls) / fmean(ends):.2f}" if len(ends) == len(of) else "- | -"
        lines.append(
            f"| {asked} | {fmean(r['true_bits'] for r in of):.3f} | {fmean(kls):.5f} {spread} "
            f"| {beside} | {fmean(r['top1'] for r in of):.2f} |"
        )
    return "\n".join(lines)


def line(rows: list[dict], row: dict) -> float | None:
    """KL between the uniform widths below and above, at the true bits of `row`; None beyond the widths measured."""
    ends = sorted((r["true_bits"], r["kl"]) for r in rows if "bits" in r)
    for (low, a), (high, b) in pairwise(ends):
        if low <= row["true_bits"] <= high:
            return round(a + (b - a) * (row["true_bits"] - low) / (high - low), 6)
    return None


def measure(arguments: argparse.Namespace, given: dict, calibration: torch.Tensor, test: torch.Tensor, at: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    began = time.perf_counter()
    report = hf_quant.quantize(model, hf_quant.QuantConfig(arguments.method, **given), data=calibration, progress=False)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = evaluate(loaded, at, test, window=arguments.window, tokens=arguments.tokens, progress=False)
    widths = {e.name.removesuffix(".weight"): e.spec["grid"]["bits"] for e in report.quantized if e.spec}
    return {
        "method": arguments.method,
        **given,
        "true_bits": round(found.bits_per_weight or 0.0, 4),
        "kl": round(found.kl or 0.0, 6),
        "kl_error": round(found.kl_error or 0.0, 6),
        "top1": round(found.top1 or 0.0, 2),
        "seconds": round(seconds, 1),
        **({"widths": widths} if "budget" in given else {}),
    }


def write(arguments: argparse.Namespace, rows: list[dict]) -> None:
    result = {
        "model": Path(arguments.model).name,
        "command": f"mixed_precision.py {Path(arguments.model).name} "
        f"{arguments.calibration.name} {arguments.test.name} "
        f"--method {arguments.method} --rows {arguments.rows} --seeds {arguments.seeds} "
        f"--window {arguments.window} --tokens {arguments.tokens} "
        f"--bits {' '.join(map(str, arguments.bits))} --by {' '.join(arguments.by)} --budgets "
        + " ".join(f'"{b}"' for b in arguments.budgets),
        "versions": {"hf-quant": hf_quant.__version__, **{n: version(n) for n in ("torch", "transformers")}},
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
