"""The column loop of GPTQ on plain tensors (arXiv:2210.17323); `gptq.py` is the glue, others reuse the loop.

Everything is transposed, `W_KN`, so that a column of the paper is a contiguous row here and all N outputs advance
together. Inside a lazy block of at most `BLOCK` columns each error is spread at once; the columns behind the block
get all of the block's errors in one matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import CalibrationError
from hf_quant.grids import Grid

BLOCK = 128
RETRIES = 6


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A column the loop has just rounded, `[N]` each.

    Attributes:
        latent: as it was compensated until it was its turn.
        clamped: the latent, moved into the representable range.
        value: what it was rounded to.
        original: the weights as they were given.
    """

    latent: Tensor
    clamped: Tensor
    value: Tensor
    original: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A correction besides GPTQ's own: `W[:, i+1:] += source(column i) (x) factor[i, i+1:]`."""

    factor_KK: Tensor
    source: Callable[[Column], Tensor]


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


def carry(M_KK: Tensor, U_KK: Tensor) -> Tensor:
    """`striu(M U^T) U`, strictly upper triangular: how an error `w_i M` is handed on to the columns behind i."""
    return (M_KK @ U_KK.T).triu(1) @ U_KK


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
    grid: Grid,
    blocks: list[tuple[int, int]],
    range_of: Callable[[int, Tensor], tuple[Tensor, Tensor | None]],
    terms: Sequence[Term] = (),
    pull: float = 0.0,
    original_KN: Tensor | None = None,
) -> Tensor:
    """Codes `[K, N]` of the columns taken in order; `W_KN` is overwritten with the compensated weights.

    `q = Q(w_i); e = (w_i - q) / U_ii; W[:, i+1:] -= e (x) U[i, i+1:]`, and what the terms add.

    Args:
        U_KK: what spreads an error, see `factorize`.
        blocks: see `lazy_blocks`.
        range_of: `(i, W_KN)` -> (scale_N, zero_N or None) of column i, called once a column, in order.
        terms: corrections besides.
        pull: FOEM's beta: `w_i -= beta (w_i - w0_i)` before rounding, and as much less error is spread.
        original_KN: what terms and pull call the original; None: the weights as they come.
    """
    U = U_KK
    original = W_KN.clone() if original_KN is None and (terms or pull) else original_KN
    codes = torch.empty_like(W_KN, dtype=torch.uint8)
    pivots = U.diagonal().reciprocal().tolist()
    ends = (
        grid.decode(torch.tensor([0, 2**grid.bits - 1], dtype=torch.uint8, device=U.device)).tolist() if terms else []
    )
    for start, end in blocks:
        errors = torch.empty_like(W_KN[start:end])
        sources = [torch.empty_like(errors) for _ in terms]
        for i in range(start, end):
            scale, zero = range_of(i, W_KN)
            w, e = W_KN[i], errors[i - start]
            if pull and original is not None:
                w.lerp_(original[i], pull)
            steps = w / scale
            if zero is not None:
                steps += zero
            codes[i] = code = grid.encode(steps)
            value = grid.decode(code)
            if zero is not None:
                value -= zero
            torch.addcmul(w, value, scale, value=-1, out=e)
            if pull and original is not None:
                e.add_(w - original[i], alpha=-pull)
            e.mul_(pivots[i])
            W_KN[i + 1 : end].addr_(U[i, i + 1 : end], e, alpha=-1)
            if terms and original is not None:
                low, high = (scale * (x if zero is None else x - zero) for x in ends)
                column = Column(w, w.clamp(low, high), value * scale, original[i])
                for term, kept in zip(terms, sources, strict=True):
                    kept[i - start] = term.source(column)
                    W_KN[i + 1 : end].addr_(term.factor_KK[i, i + 1 : end], kept[i - start])
        if end < len(W_KN):
            W_KN[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
            for term, kept in zip(terms, sources, strict=True):
                W_KN[end:].addmm_(term.factor_KK[start:end, end:].T, kept)
    return codes
