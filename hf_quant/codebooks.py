"""Codebooks: the levels that fit each block of a matrix best, by weighted k-means in one dimension (Lloyd).

Sorted, a cluster is an interval, so an iteration is a search of the borders and a difference of running sums: its cost
does not depend on how many values a block has, but for a logarithm.
"""

import torch
from torch import Tensor

from hf_quant.grids import CodebookGrid
from hf_quant.qtensor import QTensor, as_blocks, from_blocks
from hf_quant.spec import Spec

CHUNK = 1 << 20  # values at a time: running sums are float64
ITERATIONS = 50
ATOMS = 64  # of `best_cuts`
ROWS = 64  # whose tables of errors, 35 kB each, stay in the cache


def fit_codebooks(W_NK: Tensor, spec: Spec, importance_NK: Tensor | None = None) -> QTensor:
    """Minimize `sum importance (w - level)^2` block by block; each weight takes its nearest level.

    Several starts are followed to the end and the best one is kept: levels at equal distances, so that no uniform grid
    over the range of a block is better than its codebook, levels at quantiles, and (up to 4 bits) `best_cuts`.

    Args:
        W_NK: the weights.
        spec: with a `CodebookGrid`; `spec.scale` is the grid on which levels are stored.
        importance_NK: of each weight, not negative; None: all alike. A block without any counts all alike.
    """
    grid, shape = spec.grid, (W_NK.shape[0], W_NK.shape[1])
    assert isinstance(grid, CodebookGrid)  # noqa: S101  whoever calls has looked at it
    rows = max(
        spec.block_size(shape)[0], CHUNK // max(1, shape[1]) // spec.block_size(shape)[0] * spec.block_size(shape)[0]
    )
    books, codes = [], []
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        importance = torch.ones_like(W_NK[part], dtype=torch.float32) if importance_NK is None else importance_NK[part]
        book, code = _fit(W_NK[part], importance, spec, grid)
        books.append(book)
        codes.append(code)
    codebook = torch.cat(books)
    return QTensor(
        torch.cat(codes), torch.ones(codebook.shape[:2], device=W_NK.device), None, spec, shape, None, codebook
    )


def _fit(W_NK: Tensor, importance_NK: Tensor, spec: Spec, grid: CodebookGrid) -> tuple[Tensor, Tensor]:
    """(codebook `[nb, kb, levels]`, codes `[N, K]`) of some rows of blocks."""
    blocks = as_blocks(W_NK, spec)
    nb, kb, size = blocks.shape
    x = blocks.reshape(-1, size)
    real = as_blocks(torch.ones_like(W_NK, dtype=torch.float32), spec).reshape(-1, size)  # 0 in the padding
    weights = as_blocks(importance_NK, spec).reshape(-1, size)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, real)
    starts = _starts(x, real, 1 << grid.bits)
    if grid.bits <= 4:
        cut = [best_cuts(*part, 1 << grid.bits) for part in zip(x.split(ROWS), weights.split(ROWS), strict=True)]
        starts.append(torch.cat(cut))
    levels = kmeans(x, weights, starts)
    levels = spec.scale.decode(spec.scale.encode(levels))
    codes = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x).to(torch.uint8)
    return levels.reshape(nb, kb, -1), from_blocks(codes.reshape(nb, kb, size), spec, (W_NK.shape[0], W_NK.shape[1]))


def _starts(x: Tensor, real: Tensor, levels: int) -> list[Tensor]:
    """Ascending levels `[B, levels]`: at equal distances over the range, and at quantiles."""
    low = torch.where(real > 0, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(real > 0, x, -torch.inf).amax(1, keepdim=True)
    uniform = low + (high - low) * torch.linspace(0, 1, levels, device=x.device)
    ordered = torch.where(real > 0, x, torch.inf).sort(1).values
    rank = (real.sum(1, keepdim=True) * (torch.arange(levels, device=x.device) + 0.5) / levels).long()
    return [uniform, ordered.gather(1, rank.clamp_max(x.shape[1] - 1))]


def kmeans(x: Tensor, weights: Tensor, starts: list[Tensor]) -> Tensor:
    """Levels `[B, n]`, ascending, that minimize `sum_i weights_i (x_i - nearest level)^2` in each row `[B, m]` of x.

    Lloyd's iteration from every start, `[B, n]` ascending, until nothing moves; the best end in each row. A level
    that no weight is nearest to stays where it is.
    """
    x, order = x.sort(1)
    w = weights.gather(1, order).double()
    sums = [torch.nn.functional.pad(s.cumsum(1), (1, 0)) for s in (w, w * x, w * x.double().square())]
    best = least = None
    for start in starts:
        levels = start.float()
        for _ in range(ITERATIONS):
            mass, first, second = _clusters(x, levels, sums)
            moved = torch.where(mass > 0, first / mass.clamp_min(1e-300), levels.double()).float()
            if torch.equal(moved, levels):
                break
            levels = moved
        mass, first, second = _clusters(x, levels, sums)
        cost = (second - 2 * levels * first + levels.double().square() * mass).sum(1, keepdim=True)
        if best is None or least is None:
            best, least = levels, cost
        else:
            best, least = torch.where(cost < least, levels, best), torch.minimum(cost, least)
    assert best is not None  # noqa: S101  there is a start
    return best


def best_cuts(x: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Levels `[B, n]`, ascending: the means of the best cut of each sorted row into n runs of whole atoms.

    Atoms are at most `ATOMS` runs of equally many values, so that the dynamic program
    `D_k(j) = min_i D_{k-1}(i) + error of one level for atoms i .. j` is small; for few values it is exact.
    """
    (rows, size), atoms = x.shape, min(ATOMS, x.shape[1])
    x, order = x.sort(1)
    w = weights.gather(1, order).double()
    ends = torch.arange(atoms + 1, device=x.device) * size // atoms
    sums = [torch.nn.functional.pad(s.cumsum(1), (1, 0))[:, ends] for s in (w, w * x, w * x.double().square())]
    mass, first, second = (s[:, None, :] - s[:, :, None] for s in sums)  # of atoms i .. j: [B, i, j]
    error = (second - first.square() / mass.clamp_min(1e-300)).clamp_min(0)
    error.masked_fill_(torch.ones_like(error[0], dtype=torch.bool).tril(-1), torch.inf)  # an empty run costs nothing
    least, cuts = error[:, 0], []
    for _ in range(levels - 1):
        least, cut = (least[:, :, None] + error).min(1)
        cuts.append(cut)
    end = torch.full((rows, 1), atoms, device=x.device)
    runs = [end]
    for cut in reversed(cuts):
        runs.append(cut.gather(1, runs[-1]))
    borders = torch.cat([torch.zeros_like(end), *reversed(runs)], 1)
    mass, first = (s.gather(1, borders).diff(dim=1) for s in sums[:2])
    means = torch.where(mass > 0, first / mass.clamp_min(1e-300), -torch.inf)
    return torch.maximum(means, x[:, :1].double()).cummax(1).values.float()  # an empty run takes its neighbour's level


def _clusters(x: Tensor, levels: Tensor, sums: list[Tensor]) -> list[Tensor]:
    """Sums of w, w x and w x^2 over the values nearest to each level, `[B, n]` each; x is sorted."""
    borders = torch.searchsorted(x, (levels[:, 1:] + levels[:, :-1]) / 2, right=True)
    ends = torch.nn.functional.pad(borders, (1, 0))
    ends = torch.cat([ends, torch.full_like(ends[:, :1], x.shape[1])], 1)
    return [s.gather(1, ends).diff(dim=1) for s in sums]
