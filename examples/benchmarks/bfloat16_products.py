"""Seconds of a bfloat16 model's forward and gradient on this processor: by torch's own products, and as we run it.

Processors without products of bfloat16 (`hf_quant/products.py`) make them of float32; on others both are the same. In
turn, in one process and one thread; seconds are the processor's, the median of `--runs`.

    python bfloat16_products.py MODEL [--tokens 512]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_quant import products
from hf_quant.capture import run_as_it_is, run_model

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model in bfloat16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bfloat16_products.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
    ids = torch.arange(given.tokens)[None] % model.config.vocab_size
    seconds: dict[str, list[tuple[float, float]]] = {"torch": [], "ours": []}
    for _ in range(given.runs + 1):  # the first warms up
        for name, run in (("torch", run_as_it_is), ("ours", run_model)):
            seconds[name].append(timed(model, run, ids))
    median = {n: [statistics.median(s) for s in zip(*found[1:], strict=True)] for n, found in seconds.items()}
    result = {
        "model": Path(given.model).name,
        "tokens": given.tokens,
        "multiplies_bfloat16": products.multiplies_bfloat16(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {n: version(n) for n in ("hf-quant", "torch", "transformers")},
        "python": platform.python_version(),
        "seconds": {n: {"forward": round(f, 3), "gradient": round(g, 3)} for n, (f, g) in median.items()},
        "ratio": {w: round(median["torch"][i] / median["ours"][i], 2) for i, w in enumerate(("forward", "gradient"))},
    }
    print(json.dumps(result, indent=1))
    given.out.write_text(json.dumps(result, indent=1) + "\n")


def timed(model: nn.Module, run: Callable[..., Any], ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward, and of the gradient of all matrices."""
    began = time.process_time()
    logits = run(model, {"input_ids": ids}, CPU).logits
    between = time.process_time()
    torch.autograd.grad(logits.float().log_softmax(-1)[..., 0].sum(), [p for p in model.parameters() if p.dim() == 2])
    return between - began, time.process_time() - between


if __name__ == "__main__":
    main()
