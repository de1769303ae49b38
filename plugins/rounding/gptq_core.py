"""The column loop of GPTQ on plain tensors (arXiv:2210.17323); `gptq.py` is the glue, others reuse the loop.

Everything is transposed, `W_KN`, so that a column of the paper is a contiguous row here and all N outputs advance
together. Inside a lazy block of at most `BLOCK` columns each error is spread at once; the columns behind the block
get all of the block's errors in one matrix product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_quant.errors import CalibrationError
from hf_quant.grids import Grid

BLOCK = 128
RETRIES = 6


def factorize(H_KK: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of the inverse, `(H + l I)^-1 = U^T U`, `l = damp * mean(diag H)`.

    The damping grows tenfold while the matrix is not numerically positive definite.

    Raises:
        CalibrationError: still not so after several attempts (H holds NaN or infinite values).
    """
    mean = H_KK.diagonal().mean()
    eye = torch.ones_like(H_KK[0]).diag()
    for attempt in range(RETRIES):
        L, failed = torch.linalg.cholesky_ex(H_KK + eye * (mean * damp * 10**attempt))
        if not failed:
            U: Tensor
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed:
                return U
    raise CalibrationError(
        f"the input statistics of a layer with {len(H_KK)} inputs cannot be inverted even with damping "
        f"{damp * 10 ** (RETRIES - 1):g}; check the calibration data for NaN or infinite activations"
    )


def drift_factor(D_KK: Tensor, U_KK: Tensor, alpha: float) -> Tensor:
    """GPTAQ's `P = alpha * striu(D U^T) U`, strictly upper triangular (arXiv:2504.02692)."""
    return alpha * ((D_KK @ U_KK.T).triu(1) @ U_KK)


def lazy_blocks(K: int, group: int) -> list[tuple[int, int]]:
    """Consecutive `(start, end)` covering K, at most about `BLOCK` long, such that a group never straddles two
    blocks unless it starts at one: its columns are then up to date when its range is fitted."""
    if group <= BLOCK:
        step = BLOCK // group * group
        return [(b, min(b + step, K)) for b in range(0, K, step)]
    return [(b, min(b + BLOCK, g + group, K)) for g in range(0, K, group) for b in range(g, min(g + group, K), BLOCK)]


def solve_columns(
    W_KN: Tensor,
    U_KK: Tensor,
    P_KK: Tensor | None,
    grid: Grid,
    blocks: list[tuple[int, int]],
    range_of: Callable[[int, Tensor], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """Codes `[K, N]` of the columns taken in order; `W_KN` is overwritten with the compensated weights.

    `q = Q(w_i); e = (w_i - q) / U_ii; W[:, i+1:] -= e (x) U[i, i+1:] - w_i (x) P[i, i+1:]`

    Args:
        U_KK: what spreads an error, see `factorize`.
        P_KK: what carries the drift of the inputs, see `drift_factor`, or None.
        blocks: see `lazy_blocks`.
        range_of: `(i, W_KN)` -> (scale_N, zero_N or None) of column i, called once a column, in order.
    """
    U, P = U_KK, P_KK
    codes = torch.empty_like(W_KN, dtype=torch.uint8)
    pivots = U.diagonal().reciprocal().tolist()
    for start, end in blocks:
        errors = torch.empty_like(W_KN[start:end])
        for i in range(start, end):
            scale, zero = range_of(i, W_KN)
            w, e = W_KN[i], errors[i - start]
            steps = w / scale
            if zero is not None:
                steps += zero
            codes[i] = code = grid.encode(steps)
            value = grid.decode(code)
            if zero is not None:
                value -= zero
            torch.addcmul(w, value, scale, value=-1, out=e).mul_(pivots[i])
            W_KN[i + 1 : end].addr_(U[i, i + 1 : end], e, alpha=-1)
            if P is not None:
                W_KN[i + 1 : end].addr_(P[i, i + 1 : end], w)
        if end < len(W_KN):
            W_KN[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
            if P is not None:
                W_KN[end:].addmm_(P[start:end, end:].T, W_KN[start:end])
    return codes
