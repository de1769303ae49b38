"""Processor time of a quantized linear layer on CPU, one thread, bfloat16.

`python examples/benchmarks/cpu_linear.py 2048 2048 > examples/benchmarks/cpu_linear.json`: milliseconds by format, path
and number of tokens. Processor time, because a busy machine does not spoil it.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from hf_quant.formats import Layer, choose_kernel, format_named
from hf_quant.kernels.int_group import cpu
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.spec import act_spec, int_spec

TOKENS = (1, 4, 16, 32, 64, 128, 512)
LAYERS = {
    "4 bits, group 64": ("int-group/1", int_spec(4, 64), None),
    "8 bits, rows": ("int-group/1", int_spec(8, symmetric=True), None),
    "8 bits, 8-bit tokens": ("int8-act/1", int_spec(8, symmetric=True), act_spec(8)),
}


def milliseconds(f: Callable[[], object]) -> float:
    f()
    best, spent = 1e9, 0.0
    while spent < 0.3:
        start = time.thread_time()
        f()
        took = time.thread_time() - start
        best, spent = min(best, took), spent + took
    return round(best * 1e3, 2)


def main(N: int, K: int) -> None:
    torch.set_num_threads(1)
    W_NK = torch.randn(N, K)
    inputs = {T: torch.randn(T, K).bfloat16() for T in TOKENS}
    dense = W_NK.bfloat16()
    table = {"bf16 linear": {T: milliseconds(partial(F.linear, x, dense)) for T, x in inputs.items()}}
    for title, (format_id, spec, tokens) in LAYERS.items():
        fmt, layer = format_named(format_id), Layer((N, K), spec, tokens)
        blocks = as_blocks(W_NK, spec)
        tensors = fmt.pack(nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), spec), spec))
        name, _ = choose_kernel(fmt, layer, torch.device("cpu"), torch.bfloat16)
        kernel = next(k for k in fmt.kernels if k.name == name)
        blob = kernel.prepare(tensors, layer, torch.bfloat16)
        for path, limit in {"native product": 10**9, "dequantize and multiply": 0}.items():
            if format_id == "int-group/1":
                cpu.INT4_TOKENS = cpu.INT8_TOKENS = limit
            elif limit == 0:
                continue  # integers are multiplied at every size
            table[f"{title}: {path}"] = {
                T: milliseconds(partial(kernel.run, x, tensors, blob, layer)) for T, x in inputs.items()
            }
    machine = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    print(json.dumps({"shape": [N, K], "machine": machine, "milliseconds": table}, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
