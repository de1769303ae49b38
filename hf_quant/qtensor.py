"""QTensor: what a solver returns and a format packs. `dequantize` is THE definition of the stored value."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.grids import Grid, IntGrid, LevelGrid
from hf_quant.spec import Spec


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A quantized matrix.

    Invariants: `codes` is `[N, K / vector]`; `scale` and `zero` are float32 `spec.blocks((N, K))`, scale on
    `spec.scale`'s grid; `zero` is None exactly when `spec.zero == "none"`; an "int" zero is on `spec.grid`.
    When the scales are themselves stored as codes with scales (double quantization), `scale` is their value and
    `nested` holds what is stored, by name; else `nested` is None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: Spec
    shape: tuple[int, int]
    nested: Mapping[str, Tensor] | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`W_NK = (decode(codes) - zero) * scale`, computed in float32, then cast."""
        values = self.spec.grid.decode(self.codes)
        if self.zero is not None:
            values = values - expand(self.zero, self.spec, self.shape)
        return (values * expand(self.scale, self.spec, self.shape)).to(dtype)

    def slices(self) -> Iterator[tuple[slice, "QTensor"]]:
        """The matrix by slices of rows (see `row_slices`); all at once where a block is several rows high."""
        if self.spec.block[0] not in (1, -1):
            yield slice(None), self
            return
        for rows in row_slices(self.shape):
            of_scale = rows if self.scale.shape[0] > 1 else slice(None)
            zero = None if self.zero is None else self.zero[of_scale]
            codes = self.codes[rows]
            yield rows, QTensor(codes, self.scale[of_scale], zero, self.spec, (codes.shape[0], self.shape[1]))


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows of about 256 thousand values, so that float32 temporaries do not grow with the matrix."""
    step = max(1, (1 << 18) // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def expand(blocks: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """Per-block values `[nb, kb]` -> broadcastable to `[N, K]` (ragged last blocks are cut)."""
    for axis in (0, 1):
        size = spec.block[axis]
        if blocks.shape[axis] > 1 and size > 1:
            blocks = blocks.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return blocks


def nearest(W_NK: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> QTensor:
    """Round to nearest: `codes = encode(W / scale + zero)`."""
    shape = (W_NK.shape[0], W_NK.shape[1])
    steps = W_NK.float() / expand(scale, spec, shape)
    if zero is not None:
        steps = steps + expand(zero, spec, shape)
    return QTensor(spec.grid.encode(steps), scale, zero, spec, shape)


def as_blocks(W_NK: Tensor, spec: Spec) -> Tensor:
    """`[N, K] -> [nb, kb, values]`, zero-padded where the last block is ragged. Zero is inside every range."""
    shape = (W_NK.shape[0], W_NK.shape[1])
    (bn, bk), (nb, kb) = spec.block_size(shape), spec.blocks(shape)
    padded = F.pad(W_NK.float(), (0, kb * bk - shape[1], 0, nb * bn - shape[0]))
    return padded.reshape(nb, bn, kb, bk).permute(0, 2, 1, 3).reshape(nb, kb, bn * bk)


def from_extremes(low: Tensor, high: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover `[min(low, 0), max(high, 0)]`; an empty range gets scale 1, so zero is exact."""
    grid = spec.grid
    low, high = low.clamp_max(0), high.clamp_min(0)
    if spec.zero == "none":
        bottom, top = _edges(grid)
        # the negative side of a signed grid has one more step: the wider side decides; a one-sided grid has one side
        scales = [bound / edge for bound, edge in ((low, bottom), (high, top)) if edge != 0]
        return round_scale(torch.stack(scales).amax(0), spec), None
    assert isinstance(grid, IntGrid)  # noqa: S101  a zero point needs an integer grid; the plan checks it
    scale = round_scale((high - low) / (grid.high - grid.low), spec)
    zero = grid.low - low / scale
    if spec.zero == "int":
        zero = zero.round().clamp(grid.low, grid.high)
    return scale, zero


def _edges(grid: Grid) -> tuple[float, float]:
    """Smallest and largest grid value; grids with neither are taken as covering [-1, 1]."""
    match grid:
        case IntGrid():
            return grid.low, grid.high
        case LevelGrid():
            return grid.levels[0], grid.levels[-1]
        case _:
            return -1.0, 1.0


def round_scale(scale: Tensor, spec: Spec) -> Tensor:
    """Onto the grid that stores it; zero (or underflow) becomes 1."""
    rounded = spec.scale.decode(spec.scale.encode(scale))
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
