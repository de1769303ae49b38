"""Models with the traits that methods are made for: outlier channels, which small models lack."""

import torch
from torch import Tensor, nn

from hf_quant.capture import record
from hf_quant.errors import UnsupportedModel
from hf_quant.groups import find_groups
from hf_quant.rewriting.rewrite import fold
from hf_quant.sites import find_blocks, walk
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import Diagonal


@torch.no_grad()
def inject_outliers(
    model: nn.Module, batch: Batch, *, fraction: float = 0.015, factor: float = 32.0, seed: int = 0
) -> Tensor:
    """Give a small model the outlier channels of a large one, in place and without changing what it computes.

    The gains of a few channels, the same in every norm, grow by `factor`; the columns of the layers that read them
    shrink by it. With a power of two nothing is rounded.

    Args:
        model: a transformers model.
        batch: model inputs, to see which layers read which norm.
        fraction: of the channels.
        factor: how far out they lie.
        seed: which channels.

    Returns:
        The channels, ascending.

    Raises:
        UnsupportedModel: no norm of the model can take a scale.
    """
    device = next(model.parameters()).device
    blocks, sites = find_blocks(model), list(walk(model))
    recording = record(model, blocks, [batch], device)
    channels: dict[int, Tensor] = {}
    for chain in recording.chains:
        hidden = recording.starts[0][chain[0]]
        for name in chain:
            block, call = model.get_submodule(name), recording.calls[0][name]
            after = call.run(block, hidden, device)
            inside = [s for s in sites if s.block == name]
            for group in find_groups(block, name, inside, lambda b, c=call, h=hidden: c.run(b, h, device)):
                K = group.sites[0].shape[1]
                gain = None if group.producer is None else model.get_submodule(group.producer).weight
                if not isinstance(gain, Tensor) or gain.dim() != 1:
                    continue
                if K not in channels:
                    drawn = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
                    channels[K] = drawn[: max(1, round(fraction * K))].sort().values
                s_K = torch.ones(K, device=device)
                s_K[channels[K].to(device)] = 1 / factor
                fold(model, group, Diagonal(s_K))
            hidden = after
    if not channels:
        raise UnsupportedModel(f"{type(model).__name__} has no norm whose channels can be scaled")
    return channels[max(channels)]
