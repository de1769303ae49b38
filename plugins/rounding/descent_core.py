"""Coordinate descent on the quadratic error of a layer, on plain tensors, for quantease, comq and gptq-refined.

With `E = W - Q` half the gradient of `tr(E H E^T) + 2 tr(W D E^T)` in Q is `-G`, `G = E H + W D`; with the others held,
column j is best at `u = q_j + G_j / H_jj`, and on a grid at the level nearest to u. Everything is transposed,
`Q_KN`, as in `gptq_core.py`: a column of the paper is a contiguous row, and all N outputs advance together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.grids import Grid
from hf_quant.plugins.rounding.gptq_core import BLOCK
from hf_quant.qtensor import QTensor, expand, round_scale, row_slices
from hf_quant.stages.objective import Quadratic


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The representable values of every column: those of the grid, moved by its group's zero and scaled."""

    grid: Grid
    scale_GN: Tensor
    zero_GN: Tensor | None
    groups: list[int]  # of each column

    @classmethod
    def of(cls, q: QTensor) -> "Levels":
        """Those of a matrix whose blocks are one row high."""
        K, size = q.shape[1], q.spec.block_size(q.shape)[1]
        zero = None if q.zero is None else q.zero.T.contiguous()
        return cls(q.spec.grid, q.scale.T.contiguous(), zero, [j // size for j in range(K)])

    def code(self, j: int, u_N: Tensor) -> Tensor:
        """The nearest code of column j."""
        g = self.groups[j]
        steps = u_N / self.scale_GN[g]
        return self.grid.encode(steps if self.zero_GN is None else steps.add_(self.zero_GN[g]))

    def value(self, j: int, code_N: Tensor) -> Tensor:
        """What a code of column j stands for."""
        g = self.groups[j]
        value = self.grid.decode(code_N)
        return (value if self.zero_GN is None else value.sub_(self.zero_GN[g])).mul_(self.scale_GN[g])


def gradient(W_NK: Tensor, Q_NK: Tensor, quadratic: Quadratic) -> Tensor:
    """`G_NK = (W - Q) H + W D`."""
    G_NK = (W_NK - Q_NK) @ quadratic.H_KK
    return G_NK if quadratic.D_KK is None else G_NK.addmm_(W_NK, quadratic.D_KK)


def sweep(Q_KN: Tensor, codes_KN: Tensor, G_KN: Tensor, H_KK: Tensor, levels: Levels | None) -> bool:
    """Set every column to its best level in turn; with `levels` None to its best real value (codes are left alone).

    All three are updated in place, G once a block and inside it column by column. Returns whether a value moved.
    """
    moved = False
    pivots = H_KK.diagonal().reciprocal().tolist()
    for start in range(0, len(Q_KN), BLOCK):
        block = slice(start, start + BLOCK)
        before = Q_KN[block].clone()
        G, H = G_KN[block].clone(), H_KK[block, block]
        for i in range(len(before)):
            j = start + i
            best = torch.add(Q_KN[j], G[i], alpha=pivots[j])
            if levels is not None:
                codes_KN[j] = code = levels.code(j, best)
                best = levels.value(j, code)
            Q_KN[j] = best
            G[i + 1 :].addr_(H[i + 1 :, i], best - before[i], alpha=-1)
        step = Q_KN[block] - before
        if bool(step.any()):
            moved = True
            G_KN.addmm_(H_KK[:, block], step, alpha=-1)
    return moved


def row_errors(W_NK: Tensor, q: QTensor, quadratic: Quadratic) -> Tensor:
    """`diag(E H E^T) + 2 diag(W D E^T)`, `[N]`."""
    E = W_NK - q.dequantize()
    change = E @ quadratic.H_KK
    if quadratic.D_KK is not None:
        change += 2 * (W_NK @ quadratic.D_KK)
    return (change * E).sum(1)


def refit_scales(W_NK: Tensor, q: QTensor, quadratic: Quadratic) -> QTensor:
    """The same codes with the scales that make each row's error least; its own where rounding them spoils it.

    With `v_g` the codes less zero of group g, zero elsewhere, they solve `sum_h (v_g H v_h) s_h = v_g (H + D^T) w`.
    """
    H, D = quadratic.H_KK, quadratic.D_KK
    V_NK = q.spec.grid.decode(q.codes)
    if q.zero is not None:
        V_NK = V_NK - expand(q.zero, q.spec, q.shape)
    G, size = q.scale.shape[1], q.spec.block_size(q.shape)[1]
    starts = range(0, q.shape[1], size)
    target_NK = W_NK @ (H if D is None else H + D)
    fitted = torch.empty_like(q.scale)
    for rows in row_slices((q.shape[0], max(q.shape[1], G * G))):
        V = V_NK[rows]
        A = torch.empty(len(V), G, G, device=V.device)
        b = torch.empty(len(V), G, device=V.device)
        for g, a in enumerate(starts):
            product = (V[:, a : a + size] @ H[a : a + size]) * V
            A[:, g] = torch.stack([part.sum(1) for part in product.split(size, 1)], 1)
            b[:, g] = (V[:, a : a + size] * target_NK[rows, a : a + size]).sum(1)
        # a group whose values are all zero leaves its scale where it is
        ridge = A.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-6 + 1e-12
        rest = b - (A @ q.scale[rows, :, None])[:, :, 0]
        fitted[rows] = q.scale[rows] + torch.linalg.solve(A + ridge * torch.eye(G, device=V.device), rest)
    fitted = torch.where(fitted > 0, round_scale(fitted, q.spec), q.scale)
    better = QTensor(q.codes, fitted, q.zero, q.spec, q.shape)
    falls = row_errors(W_NK, better, quadratic) < row_errors(W_NK, q, quadratic)
    return QTensor(q.codes, torch.where(falls[:, None], fitted, q.scale), q.zero, q.spec, q.shape)


def descend(W_NK: Tensor, q: QTensor, quadratic: Quadratic, sweeps: int) -> QTensor:
    """At most so many sweeps over the codes, in the ranges of `q`; no sweep makes the error larger."""
    levels, Q_NK, codes_KN = Levels.of(q), q.dequantize(), q.codes.T.contiguous()
    Q_KN, G_KN = Q_NK.T.contiguous(), gradient(W_NK, Q_NK, quadratic).T.contiguous()
    for _ in range(sweeps):
        if not sweep(Q_KN, codes_KN, G_KN, quadratic.H_KK, levels):
            break
    return QTensor(codes_KN.T.contiguous(), q.scale, q.zero, q.spec, q.shape)
