"""Rows by expert, for products with many weights at once (mixtures of experts)."""

import torch
from torch import Tensor


def by_expert(expert_TC: Tensor, experts: int, BM: int) -> tuple[Tensor, Tensor]:
    """Rows of the result in the order of their experts, each expert's padded to whole tiles of BM.

    No value is read back: the number of tiles is the largest there can be, so that a graph can be captured. Tiles that
    no row fills hold no row.

    Args:
        expert_TC: `[T, copies]`, the experts each token is sent to; row `t copies + c` of the result is copy c of token
            t. What is outside `0 .. experts - 1` goes nowhere.
        experts: how many there are.
        BM: rows of a tile.

    Returns:
        (order int32 `[tiles BM]`, the number of rows where there is none; expert int32 `[tiles]`).
    """
    expert = expert_TC.flatten().long()
    rows = expert.numel()
    expert = torch.where((expert >= 0) & (expert < experts), expert, experts)  # the last bin goes nowhere
    tiles = rows // BM + min(rows, experts)  # every expert's last tile may be partly filled
    count = torch.zeros(experts + 1, dtype=torch.long, device=expert.device)
    count.scatter_add_(0, expert, torch.ones_like(expert))
    used = (count[:experts] + BM - 1) // BM  # tiles of each expert
    ends = used.cumsum(0)
    sorted_expert, row = expert.sort(stable=True)
    starts = torch.cat((count.new_zeros(1), count.cumsum(0)[:-1]))
    place = torch.arange(rows, device=expert.device) - starts[sorted_expert]  # within the expert
    first = torch.cat(((ends - used) * BM, ends.new_full((1,), tiles * BM)))  # the last bin lies behind the end
    order = expert.new_full((tiles * BM + rows,), rows)
    order[first[sorted_expert] + place] = row
    tile = torch.searchsorted(ends, torch.arange(tiles, device=expert.device), right=True).clamp_max(experts - 1)
    return order[: tiles * BM].int().contiguous(), tile.int()
