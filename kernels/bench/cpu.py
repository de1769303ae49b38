"""Processor time of quantized linear layers on CPU, one thread, bfloat16, beside torch's own product.

`python -m hf_quant.kernels.bench.cpu 2048 2048 > kernels/bench/cpu.json`: milliseconds by layer, path and number of
tokens. All take turns in one process; processor time, and the least of many calls, because a busy machine does not
spoil these.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, choose_kernel, format_named
from hf_quant.grids import E4M3, FloatGrid, LevelGrid, MiniFloatGrid
from hf_quant.kernels.bench.contenders import random_weight
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.spec import Spec, act_spec, int_spec

CPU = torch.device("cpu")
TOKENS = (1, 8, 64, 512)
DENSE, RUNS, REFERENCE = "bf16 linear", "as it runs", "dequantize and multiply"
LAYERS: dict[str, tuple[str, Spec, Spec | None]] = {
    "W2 g64": ("int-group/1", int_spec(2, 64), None),
    "W3 g64": ("int-group/1", int_spec(3, 64), None),
    "W4 g128": ("int-group/1", int_spec(4, 128), None),
    "W8 rows": ("int-group/1", int_spec(8, symmetric=True), None),
    "W8A8 rows": ("int8-act/1", int_spec(8, symmetric=True), act_spec(8)),
    "FP8 rows": ("float8/1", Spec(grid=E4M3, block=(1, -1)), None),
    "NF4 g64": ("lut-group/1", Spec(grid=LevelGrid(NF4), block=(1, 64)), None),
    "MXFP4": ("lut-group/1", Spec(grid=MiniFloatGrid(2, 1), block=(1, 32), scale=FloatGrid("float8_e8m0fnu")), None),
}
Product = Callable[[Tensor], Tensor]


def paths(shape: tuple[int, int], format_id: str, weights: Spec, inputs: Spec | None) -> dict[str, Product]:
    """The ways to compute one layer. Without a kernel it runs as the reference, which is not listed twice."""
    fmt, layer = format_named(format_id), Layer(shape, weights, inputs)
    tensors = fmt.pack(random_weight(shape, weights, CPU))
    name, _ = choose_kernel(fmt, layer, CPU, torch.bfloat16)
    kernel = next((k for k in fmt.kernels if k.name == name), None)
    products: dict[str, Product] = {REFERENCE: lambda x: fmt.reference(x, tensors, layer)}
    if kernel is not None:
        blob = kernel.prepare(tensors, layer, torch.bfloat16)
        products[RUNS] = lambda x: kernel.run(x, tensors, blob, layer)
    return products


def milliseconds(products: dict[str, Product], x_TK: Tensor, seconds: float) -> dict[str, float]:
    """The least processor time of each product, in turn, at least three rounds."""
    best: dict[str, float] = {}
    start, rounds = time.monotonic(), 0
    while rounds < 4 or time.monotonic() - start < seconds:
        for name, product in products.items():
            begin = time.thread_time()
            product(x_TK)
            if rounds:  # the first warms up
                best[name] = min(best.get(name, 1e9), (time.thread_time() - begin) * 1e3)
        rounds += 1
    return {name: round(ms, 3) for name, ms in best.items()}


def measure(shape: tuple[int, int], tokens: tuple[int, ...] = TOKENS, seconds: float = 6) -> dict[str, Any]:
    """All layers, interleaved in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    products: dict[str, Product] = {DENSE: partial(F.linear, weight=torch.randn(shape, dtype=torch.bfloat16))}
    for title, layer in LAYERS.items():
        products |= {f"{title}: {path}": product for path, product in paths(shape, *layer).items()}
    rows: dict[str, dict[str, float]] = {name: {} for name in products}
    for count in tokens:
        x_TK = torch.randn(count, shape[1], dtype=torch.bfloat16)
        for name, ms in milliseconds(products, x_TK, seconds).items():
            rows[name][str(count)] = ms
    torch.set_num_threads(threads)
    used = {"python": platform.python_version(), "torch": torch.__version__}
    machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": 1, **used}
    return {"shape": list(shape), "machine": machine, "milliseconds": rows}


if __name__ == "__main__":
    rows, columns = map(int, sys.argv[1:3])
    sys.stdout.write(json.dumps(measure((rows, columns)), indent=1) + "\n")
