"""Timing: contenders in turn within one process, medians over many rounds."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

Call = Callable[[], object]
BUSY = 200_000  # cycles, longer than Python needs to start a graph
COLD = 128 << 20  # bytes of weights that a round walks through, more than a GPU keeps in its cache


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight make a round read memory and not a cache."""
    return 1 if device.type == "cpu" else max(1, min(64, -(-COLD // max(1, nbytes))))


def interleaved(contenders: Mapping[str, list[Call]], device: torch.device, seconds: float) -> dict[str, float]:
    """Contender -> median microseconds of a call.

    Args:
        contenders: name -> calls that do the same with different copies of the weights. On a GPU they become one CUDA
            graph, so that no launch from Python is timed.
        device: where they run.
        seconds: how long to go on, at least five rounds.
    """
    runs = {name: _on_gpu(calls) if device.type == "cuda" else _on_cpu(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, start, rounds = list(runs), time.monotonic(), 0
    while rounds < 5 or time.monotonic() - start < seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            times[name].append(runs[name]() / len(contenders[name]))
        rounds += 1
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


def _on_cpu(calls: list[Call]) -> Callable[[], float]:
    for call in calls:
        call()

    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6

    return run


def _on_gpu(calls: list[Call]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and allocates
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        torch.cuda._sleep(BUSY)  # so that the graph stands in the queue before the clock starts
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    return run


def machine(device: torch.device) -> dict[str, str]:
    """The device and the versions that a figure belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    libraries = {}
    for library in ("torch", "triton", "transformers", "gemlite", "torchao", "bitsandbytes"):
        try:
            libraries[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"device": name, "cuda": torch.version.cuda or "none", "python": platform.python_version(), **libraries}
