"""Tuning: the fastest configuration for a weight on this device, kept for later processes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from hf_quant.kernels._gemm.configs import BUCKETS, Config, choose, key, limits, remember
from hf_quant.kernels._gemm.launch import matmul
from hf_quant.kernels._gemm.operand import Weight


def candidates(weight: Weight, dtype: torch.dtype, tokens: int, device: torch.device) -> Iterator[Config]:
    """What may be fastest, and fits the device's shared memory."""
    limit, processors = limits(device)
    if tokens >= 64:
        yield Config("dense")
    BM = next((b for b in (8, 16, 32, 64, 128) if b >= tokens), 256)
    ways = [("vector", tokens)] if tokens in (1, 2, 4) else []
    ways += [("tensor", BM)]
    for (way, m), BN, BK, warps, stages in product(ways, (32, 64, 128), (64, 128), (1, 2, 4, 8), (2, 3, 4)):
        if 16 * warps > BN or 128 * 32 * warps < BN * BK:  # warps without rows of their own, rows without registers
            continue
        config = Config("vector" if way == "vector" else "tensor", m, BN, BK, 1, warps, stages)
        steps = weight.shuffle.blocks(weight.shape)[1] // config.blocks(weight, dtype.itemsize)
        if config.shared_bytes(weight, dtype.itemsize) > limit:
            continue
        tiles = -(-weight.shape[0] // BN) * -(-tokens // m)
        for splits in (1, 2, 4, 8, 16):
            if splits == 1 or (splits <= steps and tiles * splits * warps <= 32 * processors):
                yield replace(config, splits=splits)


def tune(
    blob: list[Tensor],
    weight: Weight,
    dtype: torch.dtype,
    *,
    tokens: Sequence[int] = BUCKETS,
    among: Sequence[Config] | None = None,
) -> dict[str, Config]:
    """Time the candidates (or those given) on the blob's device and remember the fastest of each bucket.

    Returns:
        What was found, by `configs.key`.
    """
    device, found = blob[0].device, {}
    for count in tokens:
        x = torch.randn(count, weight.shape[1], device=device, dtype=dtype)
        tried = list(among if among is not None else candidates(weight, dtype, count, device))
        times = {}
        for config in dict.fromkeys([choose(weight, dtype, count, device), *tried]):
            try:
                times[config] = _milliseconds(x, blob, weight, dtype, config)
            except Exception as error:  # a compiler's limits are of many types
                if among is not None:
                    raise
                del error
        found[key(weight, dtype, count)] = min(times, key=lambda c: times[c])
    remember(device, found)
    return found


def _milliseconds(x: Tensor, blob: list[Tensor], weight: Weight, dtype: torch.dtype, config: Config) -> float:
    from triton.testing import do_bench

    if x.device.type != "cuda":
        import time

        start = time.perf_counter()
        matmul(x, blob, weight, dtype, config=config)
        return time.perf_counter() - start
    return float(do_bench(lambda: matmul(x, blob, weight, dtype, config=config), return_mode="median"))
