"""Shards: what is learned may lie shared out among processes (FSDP); files and codes are made of the whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. Of a shard: gathered, so every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shared(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, shared out as another of its shape is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
        yield
    finally:
        for part, name, parameter in shards:
            setattr(part, name, parameter)
