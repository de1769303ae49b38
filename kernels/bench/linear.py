"""One linear layer: microseconds of every contender for every shape and number of tokens."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_quant.kernels.bench.contenders import CONTENDERS, Contender, Shape
from hf_quant.kernels.bench.timing import Call, copies, interleaved

SHAPES: tuple[Shape, ...] = ((8192, 8192), (4096, 4096), (14336, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True, slots=True)
class Made:
    """A contender's products, one a copy of its weight."""

    contender: Contender
    products: list[Any]
    nbytes: int


def make(
    contenders: Sequence[Contender], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[list[Made], dict[str, str]]:
    """(contenders with their weights, why each other one is not there)."""
    made, absent = [], {}
    for contender in contenders:
        try:
            product, nbytes = contender.make(shape, device, dtype)
            more = [contender.make(shape, device, dtype)[0] for _ in range(copies(nbytes, device) - 1)]
        except Exception as error:  # another library's, in whatever way it fails
            absent[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        made.append(Made(contender, [product, *more], nbytes))
    return made, absent


def measure(
    device: torch.device,
    until: float,
    *,
    shapes: Sequence[Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    contenders: Sequence[Contender] = CONTENDERS,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.15,
) -> dict[str, Any]:
    """Rows `{shape, tokens, microseconds, bytes}`; what `until` (of `time.monotonic`) leaves no time for is listed."""
    rows: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for shape in shapes:
        if time.monotonic() > until:
            late.append({"shape": list(shape)})
            continue
        made, missing = make(contenders, shape, device, dtype)
        absent |= missing
        for count in tokens:
            if time.monotonic() > until:
                late.append({"shape": list(shape), "tokens": count})
                continue
            x = torch.randn(count, shape[1], device=device, dtype=dtype)
            here = [m for m in made if m.contender.tokens(count)]
            calls: dict[str, list[Call]] = {}
            for m in here:
                try:
                    m.products[0](x)
                except Exception as error:
                    absent[m.contender.name] = f"at {count} tokens: {error}".splitlines()[0][:200]
                    continue
                calls[m.contender.name] = [partial(product, x) for product in m.products]
            rows.append(
                {
                    "shape": list(shape),
                    "tokens": count,
                    "microseconds": interleaved(calls, device, seconds),
                    "bytes": {m.contender.name: m.nbytes for m in here},
                }
            )
        del made
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"dtype": str(dtype).removeprefix("torch."), "rows": rows, "absent": absent, "left_out": late}
