"""How close to full precision our methods come, beside what other libraries reach on the same model and tokens.

Each model is quantized, saved, loaded back and then measured: what a user gets, not what was in memory. The peers'
figures were measured before with the same windows (peers.json says how) and are copied, not run, here.

    python fidelity.py MODEL CALIBRATION.npy TEST.npy
"""

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant.evaluate import evaluate
from hf_quant.reference_logits import store

HERE = Path(__file__).resolve().parent
SAME_BITS = 0.06  # true bits a weight by which two checkpoints of one bit width differ in what they store beside codes


def main() -> None:
    arguments = parse()
    calibration = torch.from_numpy(np.load(arguments.calibration)[: arguments.rows].astype(np.int64))
    test = spread(np.load(arguments.test), arguments.window, arguments.tokens)
    peers = json.loads((HERE / "peers.json").read_text())["rows"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        store(original, test, folder, window=arguments.window, tokens=test.numel(), progress=False)
        for method in arguments.methods:
            for bits in arguments.bits:
                row = measure(arguments, method, bits, calibration, folder, test)
                peer = best_peer(peers, method, row["bits"])
                rows.append(row | ({"best_peer": peer, "kl_ratio": round(row["kl"] / peer["kl"], 3)} if peer else {}))
                print(line(rows[-1]), flush=True)
    result = {
        "model": Path(arguments.model).name,
        "calibration": {"file": arguments.calibration.name, "shape": list(calibration.shape)},
        "evaluation": {"file": arguments.test.name, "windows": list(test.shape), "logits": "float32"},
        "peers": "peers.json",
        "versions": {"hf-quant": hf_quant.__version__, **{n: version(n) for n in ("torch", "transformers")}},
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("calibration", type=Path, help=".npy of token ids [n, S]")
    parser.add_argument("test", type=Path, help=".npy of token ids [n]")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
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
    bits: int,
    calibration: torch.Tensor,
    logits: str,
    test: torch.Tensor,
) -> dict:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    config = hf_quant.QuantConfig(method, bits=bits, group_size=arguments.group_size)
    began = time.perf_counter()
    hf_quant.quantize(model, config, data=calibration)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        measured = evaluate(loaded, logits, test, window=test.shape[1], tokens=test.numel(), progress=False)
    return {
        "method": method,
        "width": bits,
        "group_size": arguments.group_size,
        "bits": round(measured.bits_per_weight, 4),
        "kl": round(measured.kl, 6),
        "kl_error": round(measured.kl_error, 6),
        "top1": round(measured.top1, 2),
        "perplexity": round(measured.perplexity, 3),
        "reference_perplexity": round(measured.reference_perplexity, 3),
        "seconds": round(seconds, 1),
    }


def best_peer(peers: list[dict], method: str, bits: float) -> dict | None:
    """The lowest KL of the same method at the same true bits."""
    same = [peer for peer in peers if peer["same_as"] == method and abs(peer["bits"] - bits) <= SAME_BITS]
    return min(same, key=lambda peer: peer["kl"], default=None)


def line(row: dict) -> str:
    text = f"{row['method']:5s} {row['width']} bits ({row['bits']:.3f})  KL {row['kl']:.5f} +- {row['kl_error']:.5f}"
    text += f"  top-1 {row['top1']:.2f} %  perplexity {row['perplexity']:.3f}  {row['seconds']:.1f} s"
    peer = row.get("best_peer")
    return (
        text
        if peer is None
        else text + f"   {peer['library']} {peer['method']}: KL {peer['kl']:.5f}, x{row['kl_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
