"""How close to full precision our methods come, beside what other libraries reach on the same model and tokens.

Each model is quantized, saved, loaded back and then measured: what a user gets, not what was in memory. The peers'
figures were measured before with the same windows (peers.json says how and on which model: on another there are none)
and are copied, not run, here.

Beside each row stand the best peer for the same method at the same bits (`best_peer`), the best peer whatever its
method at no more than 2.25, 3.25 or 4.25 bits (`mark`), and how far the layers are from the Gaussian rate-distortion
bound at their true bits, in the metric of their inputs on the test windows. Rows measured before, on the same model and
tokens, are kept unless they are measured again.

    python fidelity.py MODEL CALIBRATION.npy TEST.npy [--methods gptq-refined --budgets "4.25 bits"]
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.allocation.rate_distortion import rate_gap
from hf_quant.measure.evaluate import evaluate
from hf_quant.measure.reference_logits import store
from hf_quant.runtime.linear import QuantLinear
from hf_quant.stats import Gram, Seen, hessian

HERE = Path(__file__).resolve().parent
METHODS = ["rtn", "awq", "gptq", "gptaq", "foem", "rescomp", "gpfq", "comq", "quantease", "coreq", "gptq-refined"]
Rows = dict[tuple[str, int | str, int], dict]
LIMITS = (2.25, 3.25, 4.25)  # true bits at which methods are compared whatever they are
SAME_BITS = 0.06  # true bits a weight by which two checkpoints of one bit width differ in what they store beside codes


def main() -> None:
    arguments = parse()
    calibration = torch.from_numpy(np.load(arguments.calibration)[: arguments.rows].astype(np.int64))
    test = spread(np.load(arguments.test), arguments.window, arguments.tokens)
    peers = peers_of(Path(arguments.model).name)
    about = {
        "model": Path(arguments.model).name,
        "calibration": {"file": arguments.calibration.name, "shape": list(calibration.shape)},
        "evaluation": {"file": arguments.test.name, "windows": list(test.shape), "logits": "float32"},
    }
    rows = rows_before(arguments.out, about)
    with tempfile.TemporaryDirectory() as folder:
        original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        store(original, test, folder, window=arguments.window, tokens=test.numel(), progress=False)
        metrics = input_metrics(original, test)
        for method in arguments.methods:
            for size in arguments.budgets or arguments.bits:
                row = measure(arguments, method, size, calibration, folder, test, original, metrics)
                peer, mark = best_peer(peers, method, row["bits"]), best_mark(peers, row["bits"])
                row |= {"best_peer": peer, "kl_ratio": round(row["kl"] / peer["kl"], 3)} if peer else {}
                row |= {"mark": mark, "mark_ratio": round(row["kl"] / mark["kl"], 3)} if mark else {}
                rows[method, size, arguments.group_size] = row
                print(line(row), flush=True)
                write(arguments.out, about, rows)


def peers_of(model: str) -> list[dict]:
    """What the peers reached on the same model: none on another."""
    measured = json.loads((HERE / "peers.json").read_text())
    return measured["rows"] if measured["model"].split(":")[0] == model else []


def rows_before(out: Path, about: dict) -> Rows:
    """Rows of an earlier run on the same model and tokens, by method, width or budget, and group size."""
    before = json.loads(out.read_text()) if out.is_file() else {}
    same = all(before.get(name) == value for name, value in about.items())
    kept = before["rows"] if same else []
    return {(row["method"], row["width"] or row["budget"], row["group_size"]): row for row in kept}


def write(out: Path, about: dict, rows: Rows) -> None:
    result = about | {
        "peers": "peers.json",
        "versions": {"hf-quant": hf_quant.__version__, **{n: version(n) for n in ("torch", "transformers")}},
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": list(rows.values()),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def input_metrics(model: torch.nn.Module, test: torch.Tensor) -> dict[str, torch.Tensor]:
    """H of the inputs of every linear layer of the original model, on the test windows."""
    states: dict[str, dict] = {}

    def see(name: str, x: torch.Tensor) -> None:
        state = states.setdefault(name, Gram().start(x.shape[-1], x.device))
        Gram().update(state, Seen(x.reshape(-1, x.shape[-1])))

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: see(n, args[0])) for n, m in linears.items()]
    for batch in test.split(4):
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: hessian({Gram(): state}) for name, state in states.items()}


def distance(original: torch.nn.Module, loaded: torch.nn.Module, metrics: dict, bits: float) -> dict | None:
    """Errors of the layers against the bound; None for a method that rewrote the weights before it rounded them."""
    kept = dict(original.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "norm" in name and not torch.equal(parameter.float(), kept[name].float()):
            return None
    ours, bound = [], []
    for name, module in loaded.named_modules():
        if isinstance(module, QuantLinear) and name in metrics:
            W = kept[name + ".weight"].detach().float()
            energy = float(((W @ metrics[name]) * W).sum())
            error, least = rate_gap(W, module.dequantize(torch.float32), metrics[name], bits)
            ours.append(error / energy)
            bound.append(least / energy)
    gaps = [math.log2(a / b) / 2 for a, b in zip(ours, bound, strict=True)]
    return {
        "relative_error": round(statistics.geometric_mean(ours), 7),
        "gaussian_bound": round(statistics.geometric_mean(bound), 7),
        "white_inputs_bound": round(4**-bits, 7),
        "gap_bits": round(statistics.fmean(gaps), 4),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("test", type=Path, help=".npy of token ids [n]")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--budgets", nargs="+", help='sizes instead of widths, such as "4.25 bits"')
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768, help="evaluation tokens")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fidelity.json")
    return parser.parse_args()


def spread(tokens: np.ndarray, window: int, count: int) -> torch.Tensor:
    """`count` tokens in windows spread evenly over the text, first and last included: `[count / window, window]`."""
    windows = tokens[: len(tokens) // window * window].reshape(-1, window)
    chosen = np.linspace(0, len(windows) - 1, min(count // window, len(windows))).astype(int)
    return torch.from_numpy(windows[chosen].astype(np.int64))


def measure(
    arguments: argparse.Namespace,
    method: str,
    size: int | str,
    calibration: torch.Tensor,
    logits: str,
    test: torch.Tensor,
    original: torch.nn.Module,
    metrics: dict[str, torch.Tensor],
) -> dict:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    asked = {"budget": size} if isinstance(size, str) else {"bits": size}
    config = hf_quant.QuantConfig(method, **asked, group_size=arguments.group_size)
    began = time.perf_counter()
    hf_quant.quantize(model, config, data=calibration)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        measured = evaluate(loaded, logits, test, window=test.shape[1], tokens=test.numel(), progress=False)
        gap = distance(original, loaded, metrics, measured.bits_per_weight)
    return {
        "method": method,
        "width": None if isinstance(size, str) else size,
        "budget": size if isinstance(size, str) else None,
        "group_size": arguments.group_size,
        "bits": round(measured.bits_per_weight, 4),
        "kl": round(measured.kl, 6),
        "kl_error": round(measured.kl_error, 6),
        "top1": round(measured.top1, 2),
        "perplexity": round(measured.perplexity, 3),
        "reference_perplexity": round(measured.reference_perplexity, 3),
        "seconds": round(seconds, 1),
        "rate_distortion": gap,
    }


def best_peer(peers: list[dict], method: str, bits: float) -> dict | None:
    """The lowest KL of the same method at the same true bits."""
    same = [peer for peer in peers if peer["same_as"] == method and abs(peer["bits"] - bits) <= SAME_BITS]
    return min(same, key=lambda peer: peer["kl"], default=None)


def best_mark(peers: list[dict], bits: float) -> dict | None:
    """The lowest KL of any method at no more than the limit that `bits` stay below."""
    limit = min((at for at in LIMITS if bits <= at), default=None)
    below = (peer for peer in peers if limit and peer["bits"] <= limit)
    return min(below, key=lambda peer: peer["kl"], default=None)


def line(row: dict) -> str:
    text = f"{row['method']:5s} {row['budget'] or row['width']} ({row['bits']:.3f} bits)"
    text += f"  KL {row['kl']:.5f} +- {row['kl_error']:.5f}"
    text += f"  top-1 {row['top1']:.2f} %  perplexity {row['perplexity']:.3f}  {row['seconds']:.1f} s"
    for name, ratio in (("best_peer", "kl_ratio"), ("mark", "mark_ratio")):
        if peer := row.get(name):
            text += f"   {peer['library']} {peer['method']}: KL {peer['kl']:.5f}, x{row[ratio]:.2f}"
    return text


if __name__ == "__main__":
    main()
