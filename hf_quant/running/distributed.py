"""Data-parallel calibration: every process sees its share of the micro-batches, statistics are merged exactly.

Training is data-parallel as well (`learning.training`), and shards what it learns under FSDP and DeepSpeed, which
gather parameters before what they belong to runs: roundings, and the teacher, see whole matrices.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.distributed as dist

from hf_quant.errors import CalibrationError
from hf_quant.stats import Stat, State, merge

T = TypeVar("T")


def processes() -> int:
    """How many processes calibrate together; one that was launched to be of several joins them here."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()  # `accelerate launch` and torchrun leave joining to the program
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files."""
    return processes() == 1 or dist.get_rank() == 0


def sharded() -> bool:
    """Whether tensors may be shared out among processes while a model is trained (FSDP, DeepSpeed)."""
    return _asked("ACCELERATE_USE_FSDP") or by_deepspeed()


def by_deepspeed() -> bool:
    """Whether DeepSpeed steps, on copies of its own."""
    return _asked("ACCELERATE_USE_DEEPSPEED")


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def refuses_training(batch_size: int) -> str | None:
    """None when these processes can train together with as many rows a step, else the reason."""
    if by_deepspeed() and (refusal := _refuses_deepspeed()):
        return refusal
    if _asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        return (
            "training reads the parameters of a block whole and one by one, and FSDP's first version keeps one flat "
            "vector of them; use the second (accelerate launch --use_fsdp --fsdp_version 2)"
        )
    if _asked("ACCELERATE_USE_FSDP") and _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        return (
            "every process calibrates and needs the weights, which are loaded by the first one alone; launch with "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    if processes() == 1 and not by_deepspeed():
        return None
    if "LOCAL_RANK" not in os.environ:
        how = "in several processes" if processes() > 1 else "by DeepSpeed"
        return f"training {how} needs them started by torchrun or accelerate launch"
    if batch_size % processes():
        return f"batch_size={batch_size} cannot be shared by {processes()} processes; give a multiple of that"
    return None


def _refuses_deepspeed() -> str | None:
    """None when DeepSpeed can step as it is configured, else the reason."""
    if find_spec("deepspeed") is None:
        return (
            "DeepSpeed is asked for and not installed: pip install deepspeed, or use FSDP (accelerate launch "
            "--use_fsdp --fsdp_version 2)"
        )
    from accelerate.utils import DeepSpeedPlugin

    asked = DeepSpeedPlugin().deepspeed_config
    lower = [n for n in ("bf16", "fp16", "torch_autocast") if asked.get(n, {}).get("enabled") in (True, "true", "True")]
    if lower or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return (
            "DeepSpeed's mixed precision rounds what is learned, step sizes too; load the model in bfloat16 and launch "
            "with --mixed_precision no (and without bf16, fp16 or torch_autocast in DeepSpeed's config): what is "
            "learned is float32, products are the model's"
        )
    if own := [name for name in ("optimizer", "scheduler") if name in asked]:
        return f"training brings its own optimizer and schedule; take {' and '.join(own)} out of DeepSpeed's config"
    return None


def my_share(batches: Sequence[T]) -> list[T]:
    """Every n-th micro-batch; each process gets at least one.

    Raises:
        CalibrationError: there are fewer than processes (in all of them alike: none waits for another).
    """
    several = processes()
    if 0 < len(batches) < several:
        raise CalibrationError(
            f"{several} processes cannot share {len(batches)} micro-batches, of which each needs one; give "
            "smaller ones, more data, or start fewer processes"
        )
    return list(batches)[dist.get_rank() :: several] if several > 1 else list(batches)


def union(mine: set[T]) -> set[T]:
    """What any process has seen."""
    if processes() == 1:
        return mine
    seen: list[set[T]] = [set() for _ in range(processes())]
    dist.all_gather_object(seen, mine)
    return set().union(*seen)


def reduce_states(states: dict[str, dict[Stat, State]]) -> dict[str, dict[Stat, State]]:
    """The states one process seeing all micro-batches would have. A no-op with one process."""
    if processes() == 1:
        return states
    seen: list[dict[str, tuple[Stat, ...]]] = [{} for _ in range(processes())]
    dist.all_gather_object(seen, {path: tuple(of) for path, of in states.items()})
    paths = sorted({path for part in seen for path in part})  # some processes may not have reached a site
    merged: dict[str, dict[Stat, State]] = {}
    for path in paths:
        stats = next(part[path] for part in seen if path in part)
        merged[path] = {stat: _merged(stat, states.get(path, {}).get(stat)) for stat in stats}
    return merged


def _merged(stat: Stat, mine: State | None) -> State:
    """One state from those of all processes that have one, merged in the order of their ranks."""
    shapes: list[dict[str, tuple[tuple[int, ...], torch.dtype]] | None] = [None] * processes()
    dist.all_gather_object(shapes, None if mine is None else {k: (tuple(v.shape), v.dtype) for k, v in mine.items()})
    result: State | None = None
    for rank, layout in enumerate(shapes):
        if layout is None:
            continue
        device = "cpu" if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
        part: State = {}
        for name, (shape, dtype) in layout.items():
            own = mine is not None and dist.get_rank() == rank
            tensor = (
                mine[name].to(device) if own and mine is not None else torch.empty(shape, dtype=dtype, device=device)
            )
            dist.broadcast(tensor, src=rank)
            part[name] = tensor
        result = part if result is None else merge(stat, result, part)
    assert result is not None  # noqa: S101  at least one process has seen it
    return result
