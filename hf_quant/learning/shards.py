"""Shards: what is learned may lie shared out among processes (FSDP, ZeRO 3); files and codes are made of the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from hf_quant.learning import zero


def whole(tensor: Tensor) -> Tensor:
    """All of it. Of a shard: gathered, so every process has to ask."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    with zero.gathered([tensor]):
        return tensor.detach().clone() if zero.is_part(tensor) else tensor


def mine(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shared(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, shared out as another of its shape is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def state_of(optimizer: Any, groups: zero.Groups) -> dict[str, Any]:  # noqa: ANN401  of accelerate
    """`optimizer.state_dict()`, of whole parameters. Every process has to ask."""
    if any(map(zero.is_copied, chain.from_iterable(groups))):
        return zero.state_of(optimizer, groups)
    state: dict[str, Any] = tree_map_only(Tensor, whole, optimizer.state_dict())
    return state


def give_state(optimizer: Any, groups: zero.Groups, state: dict[str, Any]) -> None:  # noqa: ANN401
    """What `state_of` told, shared out as parameters are now."""
    if any(map(zero.is_copied, chain.from_iterable(groups))):
        return zero.give_state(optimizer, groups, state)
    of = [p for group in optimizer.param_groups for p in group["params"]]  # FSDP has put others in place
    for i, kept in state["state"].items():
        state["state"][i] = {name: as_shared(tensor, of[i]) for name, tensor in kept.items()}
    optimizer.load_state_dict(state)
    return None


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The parameters of a module are whole and apart from the graph."""
    shards = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    with torch.no_grad():
        for part, name, parameter in shards:
            setattr(part, name, nn.Parameter(whole(parameter), requires_grad=False))
    try:
        with zero.gathered(list(module.parameters())):
            yield
    finally:
        for part, name, parameter in shards:
            setattr(part, name, parameter)
