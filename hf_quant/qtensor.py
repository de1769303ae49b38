"""QTensor: what a solver returns and a format packs. `dequantize` is THE definition of the stored value."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.finite import all_finite
from hf_quant.grids import CodebookGrid, FloatGrid, Grid, IntGrid, MiniFloatGrid, TableGrid
from hf_quant.spec import Spec


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A quantized matrix.

    Invariants: `codes` is `[N, K / vector]`; `scale` and `zero` are float32 `spec.blocks((N, K))`, scale on
    `spec.scale`'s grid; `zero` is None exactly when `spec.zero == "none"`; an "int" zero is on `spec.grid`.
    When the scales are themselves stored as codes with scales (double quantization), `scale` is their value and
    `nested` holds what is stored, by name; else `nested` is None.
    `codebook` is float32 `[*spec.blocks((N, K)), 2^bits]`, ascending, on `spec.scale`'s grid, when the grid is a
    `CodebookGrid`, else None; the levels then carry the scale and `scale` is all ones.
    `tensor_scale` is float32 `[1]` when `spec.tensor_scale`, else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: Spec
    shape: tuple[int, int]
    nested: Mapping[str, Tensor] | None = None
    codebook: Tensor | None = None
    tensor_scale: Tensor | None = None

    def flaw(self, shape: tuple[int, int], spec: Spec) -> str | None:
        """None when it keeps the invariants and is such a matrix, quantized so; else what is wrong."""
        for name, own, wanted in (("shape", tuple(self.shape), tuple(shape)), ("spec", self.spec, spec)):
            if own != wanted:
                return f"{name} is {own}, not {wanted}"
        blocks, grid = spec.blocks(shape), spec.grid
        learned = isinstance(grid, CodebookGrid)
        for name, tensor, there, size in (
            ("codes", self.codes, True, (shape[0], -(-shape[1] // grid.vector))),
            ("scale", self.scale, True, blocks),
            ("zero", self.zero, spec.zero != "none", blocks),
            ("codebook", self.codebook, learned, (*blocks, 2**grid.bits) if learned else ()),
        ):
            if (tensor is not None) != there:
                return f"{name} is {'missing' if there else 'there'}, and the spec says otherwise"
            if tensor is None:
                continue
            if tuple(tensor.shape) != size:
                return f"{name} is {list(tensor.shape)}, not {list(size)}"
            if tensor.is_floating_point() and not all_finite(tensor):
                return f"{name} holds NaN or infinite values"
        if isinstance(grid, FloatGrid):
            return None
        codes = 1 << round(grid.bits * grid.vector) if not isinstance(grid, TableGrid) else len(grid.table())
        low, high = (int(end) for end in self.codes.aminmax()) if self.codes.numel() else (0, 0)
        if self.codes.is_floating_point() or low < 0 or high >= codes:
            return f"codes are not integers from 0 to {codes - 1}"
        if spec.zero == "int" and self.zero is not None and not _on_grid(self.zero, grid):
            return "an integer zero point does not lie on the grid"
        if self.nested is None and not torch.equal(spec.scale.decode(spec.scale.encode(self.scale)), self.scale):
            return f"scale does not lie on the grid it is stored on, {spec.scale}"
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`W_NK = (decode(codes) - zero) * scale [* tensor_scale]`, rotated back, in float32, then cast.

        By slices of rows, which gives the same bits without float32 temporaries of the whole matrix.
        """
        parts = [part._values().to(dtype) for _, part in self.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _values(self) -> Tensor:
        if self.codebook is None:
            values = self.spec.grid.decode(self.codes)
        else:
            values = lookup(self.codebook, self.codes, self.spec, self.shape)
        if self.zero is not None:
            values = values - expand(self.zero, self.spec, self.shape)
        values = values * expand(self.scale, self.spec, self.shape)
        values = values if self.tensor_scale is None else values * self.tensor_scale
        return values if self.spec.rotation is None else self.spec.rotation.inverse(values)

    def slices(self) -> Iterator[tuple[slice, "QTensor"]]:
        """The matrix by slices of rows (see `row_slices`); all at once where a block is several rows high."""
        whole = self.spec.block[0] not in (1, -1)
        for rows in [slice(None)] if whole or self.shape[0] == 0 else row_slices(self.shape):
            yield rows, self.rows(rows)

    def rows(self, rows: slice | Tensor) -> "QTensor":
        """Some of the rows, where each has its own scales or all share them."""

        def own(blocks: Tensor | None) -> Tensor | None:
            return blocks if blocks is None or blocks.shape[0] == 1 else blocks[rows]

        codes, scale = self.codes[rows], own(self.scale)
        assert scale is not None  # noqa: S101  only what is None stays None
        shape = codes.shape[0], self.shape[1]
        return replace(self, codes=codes, scale=scale, zero=own(self.zero), codebook=own(self.codebook), shape=shape)


def _on_grid(zero: Tensor, grid: Grid) -> bool:
    return isinstance(grid, IntGrid) and bool(((zero == zero.round()) & (zero >= grid.low) & (zero <= grid.high)).all())


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


def lookup(codebook: Tensor, codes: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """Each code's level in the codebook of its block: `[N, K]`."""
    (rows, columns), levels = spec.block_size(shape), codebook.shape[-1]
    row, column = (torch.arange(size, device=codes.device) // b for size, b in zip(shape, (rows, columns), strict=True))
    if codebook.shape[0] == 1:
        row = torch.zeros_like(row)
    first = (row[:, None] * codebook.shape[1] + column) * levels
    return codebook.flatten()[first + codes]


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


def from_blocks(blocks: Tensor, spec: Spec, shape: tuple[int, int]) -> Tensor:
    """Inverse of `as_blocks`: `[nb, kb, values] -> [N, K]`, without the padding."""
    (bn, bk), (nb, kb) = spec.block_size(shape), spec.blocks(shape)
    whole = blocks.reshape(nb, kb, bn, bk).permute(0, 2, 1, 3).reshape(nb * bn, kb * bk)
    return whole[: shape[0], : shape[1]].contiguous()


def without_outer(W_NK: Tensor, spec: Spec) -> tuple[Tensor, Spec, Tensor | None]:
    """What a solver sees of a matrix with a rotation or a tensor scale: (the matrix without, its spec, that scale).

    The scale makes the largest value of the tensor the largest product of the two grids.
    """
    if not spec.outer:
        return W_NK, spec, None
    W_NK = W_NK.float() if spec.rotation is None else spec.rotation.apply(W_NK.float())
    plain = replace(spec, tensor_scale=False, rotation=None)
    if not spec.tensor_scale:
        return W_NK, plain, None
    top = W_NK.abs().amax()
    tops = _edges(spec.grid)[1] * _edges(spec.scale)[1]
    scale = torch.where(top > 0, top / tops, torch.ones_like(top)).reshape(1)
    return W_NK.div_(scale) if spec.rotation else W_NK / scale, plain, scale


def with_outer(q: QTensor, spec: Spec, tensor_scale: Tensor | None) -> QTensor:
    """The quantized matrix whose `without_outer`, with that spec, a solver made `q` of."""
    if not spec.outer:
        return q
    whole = replace(q.spec, tensor_scale=spec.tensor_scale, rotation=spec.rotation)
    return replace(q, spec=whole, tensor_scale=tensor_scale)


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
        case MiniFloatGrid():
            return -grid.high, grid.high
        case FloatGrid():
            top = torch.finfo(grid.torch_dtype).max
            return -top, top
        case TableGrid():
            table = grid.table()
            return float(table.min()), float(table.max())
        case _:
            return -1.0, 1.0


def round_scale(scale: Tensor, spec: Spec) -> Tensor:
    """Onto the grid that stores it; zero (or underflow) becomes 1, or tiny when the weights' grid has no zero."""
    rounded = spec.scale.decode(spec.scale.encode(scale))
    instead = 1.0
    if isinstance(spec.grid, TableGrid) and isinstance(spec.scale, FloatGrid) and bool(spec.grid.table().any(1).all()):
        instead = torch.finfo(spec.scale.torch_dtype).smallest_normal
    return torch.where((rounded > 0) & (scale > 0), rounded, torch.full_like(rounded, instead))
