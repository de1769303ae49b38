"""Compile what a benchmark will run, on all cores: Triton keeps it on disk, one process would take minutes."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch

from hf_quant.kernels.bench.contenders import CONTENDERS, Shape

Job = tuple[str, Shape, tuple[int, ...]]


def jobs(shapes: Sequence[Shape], tokens: Sequence[int]) -> list[Job]:
    """(contender, shape, numbers of tokens) for each format of ours; the longest first."""
    ours = [c for c in CONTENDERS if "-" in c.name.split()[0] or c.name.startswith("float8")]
    some = [tuple(tokens[i : i + 3]) for i in range(0, len(tokens), 3)]
    return [(c.name, shape, counts) for shape, c, counts in product(shapes, ours, some) if any(map(c.tokens, counts))]


def run(job: Job, device_type: str = "cuda") -> None:
    """One product for each number of tokens."""
    name, shape, tokens = job
    device, contender = torch.device(device_type), next(c for c in CONTENDERS if c.name == name)
    multiply, _ = contender.make(shape, device, torch.bfloat16)
    for count in filter(contender.tokens, tokens):
        multiply(torch.randn(count, shape[1], device=device, dtype=torch.bfloat16))


def compile_all(shapes: Sequence[Shape], tokens: Sequence[int], until: float) -> int:
    """How many jobs were done before `until` (of `time.monotonic`); the rest is compiled when it is timed."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(max(1, cores - 1), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, job) for job in jobs(shapes, tokens)]
        while time.monotonic() < until and not all(f.done() for f in futures):
            time.sleep(0.2)
        pool.shutdown(wait=True, cancel_futures=True)
    return sum(f.done() and not f.cancelled() and f.exception() is None for f in futures)
