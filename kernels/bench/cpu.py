"""Processor time of quantized linear layers on CPU, one thread, beside torch's own and other libraries.

`python -m hf_quant.kernels.bench.cpu 2048 2048 > kernels/bench/cpu-amx.json` (`cpu.json` where AVX-512 is all there is,
`cpu-avx2.json` where AVX2 is):
milliseconds by layer, path and number of tokens. All take turns in one process, and before each call 64 MB of something
else are read: everybody's weights come out of memory, as they do in a model, whoever was there before. Processor time,
and the least of many calls, because a busy machine does not spoil these. Other libraries (`cpu_peers.py`) take part
where they can be imported.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, choose_kernel, format_named
from hf_quant.grids import E4M3, CodebookGrid, FloatGrid, LevelGrid, MiniFloatGrid
from hf_quant.kernels._cpu import native
from hf_quant.kernels.bench.contenders import random_weight
from hf_quant.kernels.bench.cpu_peers import PEERS, Bind, Call, Peer
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec, int_spec

CPU = torch.device("cpu")
TOKENS = (1, 8, 64, 512)
ELSE = 1 << 24  # float32
DENSE, FLOAT, RUNS, REFERENCE = "bf16 linear", "f32 linear", "as it runs", "dequantize and multiply"
SLOW = 0.5  # seconds for 8 tokens: on a processor that it was not made for
WRONG = 0.25  # relative error of a product that is another product: 4 bits in blocks give 0.1
LAYERS: dict[str, tuple[str, Spec, Spec | None]] = {
    "W2 g64": ("int-group/1", int_spec(2, 64), None),
    "W3 g64": ("int-group/1", int_spec(3, 64), None),
    "W4 g128": ("int-group/1", int_spec(4, 128), None),
    "W4A8 g128": ("int-group/1", int_spec(4, 128), act_spec(8)),
    "W8 rows": ("int-group/1", int_spec(8, symmetric=True), None),
    "W8A8 rows": ("int8-act/1", int_spec(8, symmetric=True), act_spec(8)),
    "FP8 rows": ("float8/1", Spec(grid=E4M3, block=(1, -1)), None),
    "NF4 g64": ("lut-group/1", Spec(grid=LevelGrid(NF4), block=(1, 64)), None),
    "MXFP4": ("lut-group/1", Spec(grid=MiniFloatGrid(2, 1), block=(1, 32), scale=FloatGrid("float8_e8m0fnu")), None),
    "NVFP4": (
        "lut-group/1",
        Spec(grid=MiniFloatGrid(2, 1), block=(1, 16), scale=FloatGrid("float8_e4m3fn"), tensor_scale=True),
        None,
    ),
    "codebook 4, rows": ("codebook-group/1", Spec(grid=CodebookGrid(4), block=(1, -1)), None),
    "codebook 3, rows": ("codebook-group/1", Spec(grid=CodebookGrid(3), block=(1, -1)), None),
}


def paths(shape: tuple[int, int], format_id: str, weights: Spec, inputs: Spec | None) -> dict[str, Bind]:
    """The ways to compute one layer. Without a kernel it runs as the reference, which is not listed twice."""
    fmt, layer = format_named(format_id), Layer(shape, weights, inputs)
    tensors = fmt.pack(_with_codebook(random_weight(shape, weights, CPU)))
    name, _ = choose_kernel(fmt, layer, CPU, torch.bfloat16)
    kernel = next((k for k in fmt.kernels if k.name == name), None)
    products: dict[str, Bind] = {REFERENCE: lambda x: partial(fmt.reference, x, tensors, layer)}
    if kernel is not None:
        blob = kernel.prepare(tensors, layer, torch.bfloat16)
        products[RUNS] = lambda x: partial(kernel.run, x, tensors, blob, layer)
    return products


def _with_codebook(q: QTensor) -> QTensor:
    if not isinstance(q.spec.grid, CodebookGrid):
        return q
    levels = torch.randn(*q.spec.blocks(q.shape), 1 << q.spec.grid.bits).bfloat16().float().sort().values
    return QTensor(q.codes, torch.ones_like(q.scale), None, q.spec, q.shape, codebook=levels)


def present(peers: Sequence[Peer], W_NK: Tensor) -> tuple[dict[str, Bind], dict[str, str]]:
    """(those that compute the product with the weight, why the others are not there)."""
    found: dict[str, Bind] = {}
    absent: dict[str, str] = {}
    x_TK = torch.randn(8, W_NK.shape[1]).bfloat16()
    expected = x_TK.float() @ W_NK.T
    for peer in peers:
        try:
            bind = peer.make(W_NK)
            call = bind(x_TK)
            error = float((torch.as_tensor(call()).float() - expected).norm() / expected.norm())
            begin = time.process_time()
            call()
            seconds = time.process_time() - begin
        except Exception as problem:  # whatever is wrong with somebody else's package is told
            absent[peer.name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
            continue
        if error >= WRONG:
            absent[peer.name] = f"another product: error {error:.2f}"
        elif seconds > SLOW:
            absent[peer.name] = f"takes {seconds:.1f} s for 8 tokens"
        else:
            found[peer.name] = bind
    return found, absent


def milliseconds(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """The least processor time of each call, in turn, at least three rounds."""
    best: dict[str, float] = {}
    start, rounds, other = time.monotonic(), 0, torch.ones(ELSE)
    while rounds < 4 or time.monotonic() - start < seconds:
        for name, call in calls.items():
            other.sum()
            begin = time.process_time()
            call()
            if rounds:  # the first warms up
                best[name] = min(best.get(name, 1e9), (time.process_time() - begin) * 1e3)
        rounds += 1
    return {name: round(ms, 3) for name, ms in best.items()}


def measure(
    shape: tuple[int, int], tokens: tuple[int, ...] = TOKENS, seconds: float = 30, peers: Sequence[Peer] = PEERS
) -> dict[str, Any]:
    """All layers and all who are there, interleaved in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    W_NK = torch.randn(shape)
    dense = W_NK.bfloat16()
    products: dict[str, Bind] = {DENSE: lambda x: partial(F.linear, x, dense)}
    products[FLOAT] = lambda x: partial(F.linear, x.float(), W_NK)
    for title, layer in LAYERS.items():
        products |= {f"{title}: {path}": product for path, product in paths(shape, *layer).items()}
    others, absent = present(peers, W_NK)
    products |= others
    rows: dict[str, dict[str, float]] = {name: {} for name in products}
    for count in tokens:
        x_TK = torch.randn(count, shape[1]).bfloat16()
        for name, ms in milliseconds({name: bind(x_TK) for name, bind in products.items()}, seconds).items():
            rows[name][str(count)] = ms
    torch.set_num_threads(threads)
    used = {"python": platform.python_version(), "torch": torch.__version__}
    used |= {p.package: version(p.package) for p in peers if p.name in others and p.package is not None}
    machine = {"cpu": "AMX" if native.tiled() else torch.backends.cpu.get_cpu_capability(), "threads": 1, **used}
    bits = {p.name: {"weights": p.weights, "inputs": p.inputs} for p in peers if p.name in others}
    ours = {
        title: {"weights": _bits(weights), "inputs": 16 if inputs is None else _bits(inputs)}
        for title, (_, weights, inputs) in LAYERS.items()
    }
    measured = {"layers": ours, "peers": bits, "absent": absent, "milliseconds": rows}
    return {"shape": list(shape), "machine": machine, **measured}


def _bits(spec: Spec) -> int:
    return math.ceil(spec.grid.bits)


if __name__ == "__main__":
    rows, columns = map(int, sys.argv[1:3])
    sys.stdout.write(json.dumps(measure((rows, columns)), indent=1) + "\n")
