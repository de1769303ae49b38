"""Zero: under DeepSpeed what is learned is stepped on float32 copies, shared out among processes; in ZeRO 3 all is.

What is put back after a step has to reach these copies (`altered`), and the state of the optimizer lies beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer

from hf_quant.running.distributed import processes

Groups = Sequence[Sequence[nn.Parameter]]  # those that an optimizer was made of
MOMENTS = ("exp_avg", "exp_avg_sq")


def hand_over(trainer: Trainer, clip: float) -> None:
    """Leave batches, clipping and types to `trainer`, whatever DeepSpeed was configured to; nothing without DeepSpeed.

    What the Trainer does for DeepSpeed besides is for models, optimizers and checkpoints that are DeepSpeed's.
    """
    if not trainer.is_deepspeed_enabled:
        return
    trainer.is_deepspeed_enabled = False
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": trainer.args.per_device_train_batch_size,
        "train_batch_size": trainer.args.per_device_train_batch_size * processes(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
    }


def is_part(tensor: Tensor) -> bool:
    """Whether a parameter lies shared out among processes (ZeRO 3)."""
    return hasattr(tensor, "ds_id")


def is_copied(tensor: Tensor) -> bool:
    """Whether what is stepped is a copy of it."""
    return is_part(tensor) or hasattr(tensor, "_hp_mapping")


def gathered(parameters: Sequence[Tensor], changed: bool = False) -> AbstractContextManager[Any]:
    """Inside parameters of ZeRO 3 are whole; afterwards processes have the first one's, if they are `changed`."""
    parts = [p for p in parameters if is_part(p)]
    if not parts:
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None)
    return whole


@contextmanager
def altered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside parameters are whole; what they become inside, all processes alike, is what the next step goes on from."""
    with gathered(parameters, changed=True):
        yield
        for parameter in parameters:
            if is_copied(parameter):
                _put(parameter, parameter.detach())


def state_of(optimizer: Any, groups: Groups) -> dict[str, Any]:  # noqa: ANN401  of accelerate
    """What AdamW's `state_dict()` would be without DeepSpeed, of whole parameters. Every process has to ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer.optimizer, groups)
    step, told = next(iter(optimizer.state.values()))["step"], []
    state: dict[int, dict[str, Any]] = {}
    for own, parameters in zip(optimizer.param_groups, groups, strict=True):
        numbers = [*range(len(state), len(state) + len(parameters))]
        moments = [{key: safe_get_full_optimizer_state(p, key) for key in MOMENTS} for p in parameters]
        state |= {i: {"step": deepcopy(step)} | both for i, both in zip(numbers, moments, strict=True)}
        told.append(own | {"params": numbers})
    return {"state": state, "param_groups": told}


def give_state(optimizer: Any, groups: Groups, kept: Mapping[str, Any]) -> None:  # noqa: ANN401
    """What `state_of` told, shared out among as many processes as there are now."""
    zero = optimizer.optimizer
    flat = getattr(zero, "fp32_partitioned_groups_flat", None) or [p for g in zero.param_groups for p in g["params"]]
    for part in flat:  # AdamW makes its state in the first step
        moments = {key: torch.zeros_like(part) for key in MOMENTS}
        zero.state[part] = {"step": deepcopy(kept["state"][0]["step"])} | moments
    _link(zero, groups)
    for i, parameter in enumerate(chain.from_iterable(groups)):
        for key in MOMENTS:
            _put(parameter, kept["state"][i][key], key)
    for group, before in zip(zero.param_groups, kept["param_groups"], strict=True):
        group["lr"] = before["lr"]


def _link(zero: Any, groups: Groups) -> None:  # noqa: ANN401
    """ZeRO 1 and 2 note where a parameter's moments lie in the first step, before those of later groups are there."""
    for parameter in chain.from_iterable(groups):
        if (at := getattr(parameter, "_hp_mapping", None)) is not None:  # this process has some of it
            part = zero.param_groups[at.param_group_index]["params"][0]
            at.set_optim_state_fragment(part, zero.state[part])


def _put(parameter: Tensor, value: Tensor, key: str | None = None) -> None:
    """Give a whole value to the float32 copy of a parameter, or to what the optimizer holds of it under `key`."""
    from deepspeed import utils

    how, options = "full", () if key is None else (key,)
    value = value.to(parameter.device)
    if is_part(parameter):  # `safe_set_full...` cannot set parameters that processes cannot share evenly
        share: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = pad(value.flatten(), (0, share * dist.get_world_size() - value.numel()))
        how, value = "local", flat[share * dist.get_rank() :][:share]
    name = f"safe_set_{how}_{'fp32_param' if key is None else 'optimizer_state'}"
    getattr(utils, name)(parameter, value, *options)
