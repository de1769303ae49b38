"""Beam search over the columns of GPTQ's loop, on plain tensors (arXiv:2602.05902); `coreq.py` is the glue.

In that loop a row's damped error is the sum of its `e_i^2`, `e_i = (w_i - q_i) / U_ii`, and w_i depends on the columns
before i only. So of the partial solutions of a row the `width` cheapest are kept, each branching to the two levels
nearest to its w_i. Tensors have an axis B of partial solutions, cheapest first, behind that of the rows.
"""

import torch
from torch import Tensor

from hf_quant.plugins.rounding.descent_core import Levels
from hf_quant.plugins.rounding.gptq_core import BLOCK


def beam(W_KN: Tensor, U_KK: Tensor, levels: Levels, width: int) -> Tensor:
    """Codes `[K, N]`; no row's triangular cost is above that of the greedy choice, `width` 1."""
    greedy, least = _search(W_KN, U_KK, levels, 1)
    if width == 1:
        return greedy
    found, cost = _search(W_KN, U_KK, levels, width)
    return torch.where(cost < least, found, greedy)


def _search(W_KN: Tensor, U_KK: Tensor, levels: Levels, width: int) -> tuple[Tensor, Tensor]:
    """Codes and cost of each row's cheapest solution."""
    K, N = W_KN.shape
    W = W_KN[:, :, None].repeat(1, 1, width)
    codes = torch.zeros(K, N, width, dtype=torch.uint8, device=W.device)
    cost = W.new_full((N, width), torch.inf)
    cost[:, 0] = 0
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        errors = torch.zeros_like(W[start:end])
        lineage = torch.arange(width, device=W.device).expand(N, width)  # at the start of the block
        for i in range(start, end):
            code, e = _two_nearest(W[i], i, levels)
            e /= U_KK[i, i]
            total = (cost[:, :, None] + e.square()).flatten(1)
            cost, chosen = total.topk(width, largest=False)
            parent = chosen // 2
            lineage = lineage.gather(1, parent)
            for rows in (W[i + 1 : end], errors[: i - start], codes[start:i]):
                rows.copy_(rows.gather(2, parent.expand(rows.shape)))
            codes[i], errors[i - start] = code.flatten(1).gather(1, chosen), e.flatten(1).gather(1, chosen)
            W[i + 1 : end] -= U_KK[i, i + 1 : end, None, None] * errors[i - start]
        for rows in (codes[:start], W[end:]):
            rows.copy_(rows.gather(2, lineage.expand(rows.shape)))
        if end < K:
            W[end:] -= (U_KK[start:end, end:].T @ errors.flatten(1)).view(K - end, N, width)
    return codes[:, :, 0].contiguous(), cost[:, 0]


def _two_nearest(w_NB: Tensor, i: int, levels: Levels) -> tuple[Tensor, Tensor]:
    """`[N, B, 2]`: the codes of the two levels nearest to w and how far w is from each (infinitely: there is none)."""
    first = levels.code(i, w_NB)
    away = w_NB - levels.value(i, first)
    second = first.int() + torch.where(away >= 0, 1, -1)
    exists = (second >= 0) & (second < 2**levels.grid.bits)
    second = second.clamp(0, 2**levels.grid.bits - 1).to(torch.uint8)
    far = torch.where(exists, w_NB - levels.value(i, second), torch.inf)
    return torch.stack((first, second), -1), torch.stack((away, far), -1)
