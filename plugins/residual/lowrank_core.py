"""The best low-rank term under a weighting of inputs: `argmin ||(E - U D) S||_F` over rank R is `SVD_R(E S) S^-1`."""

import torch
from torch import Tensor


def low_rank(E_NK: Tensor, rank: int, S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(down_RK, up_NR)` with `up down` nearest to E under S; the singular values are shared between the two.

    Args:
        E_NK: what is to be made up for.
        rank: at most `min(N, K)`; above it the term is exact.
        S: `[K]` positive (a diagonal) or `[K, K]` symmetric positive definite; None: the identity.
    """
    E = E_NK.double()
    weighted = E if S is None else E * S if S.dim() == 1 else E @ S
    U, s, V = torch.linalg.svd(weighted, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    up, down = U[:, :rank] * root, root[:, None] * V[:rank]
    if S is not None:
        down = down / S if S.dim() == 1 else torch.linalg.solve(S, down.T).T
    return down.float(), up.float()


def symmetric_root(H_KK: Tensor, damp: float) -> Tensor:
    """`(H + damp mean(diag H) I)^(1/2)` in float64."""
    H = H_KK.double()
    H = H + damp * H.diagonal().mean().clamp_min(1e-30) * torch.eye(len(H), dtype=H.dtype, device=H.device)
    values, vectors = torch.linalg.eigh(H)
    root: Tensor = (vectors * values.clamp_min(values[-1] * 1e-12).sqrt()) @ vectors.T
    return root
