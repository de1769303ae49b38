"""CPU kernels of tables: several values a lookup, some rows at a time, multiplied while they are in the cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import CodebookGrid, FloatGrid, TableGrid
from hf_quant.kernels.int_group.bitstream import unpack_bits
from hf_quant.kernels.lut.decode import table_grid
from hf_quant.products import operand
from hf_quant.runtime.activation import fake_quantize
from hf_quant.spec import Spec

DECODED, MULTIPLIED = 1 << 17, 1 << 19  # weights at a time: temporaries, and the matrix they become, stay in the cache
FIELD = {2: 8, 3: 12, 4: 16, 6: 12, 8: 16}  # bits looked up at once, by the bits of a code
ENTRY = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # values of a field are copied as one


@dataclass(frozen=True, slots=True)
class TableCpu:
    """`W = table[code] * scale`, the bits of the reference: a table of whole fields of codes, one lookup each.

    Values and scales are multiplied in bfloat16 where it holds both exactly, else in float32.
    """

    name: ClassVar[str] = "table-cpu"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        grid, spec = table_grid(layer), layer.weights
        if (reason := _refuses(layer, device, dtype)) is not None:
            return reason
        if spec.rotation is not None:
            return "the weights are rotated"
        if grid.vector != 1 or grid.code_bits not in FIELD:
            return f"codes of {grid.code_bits} bits for {grid.vector} values do not fill fields of 8, 12 or 16 bits"
        return None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[the table of fields]: one for all layers with the same grid."""
        grid, kind = table_grid(layer), _lookup_type(layer.weights, dtype)
        return [_table(grid, kind)]  # type: ignore[arg-type]  # grids are frozen dataclasses, so hashable

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        spec, (N, K), bits = layer.weights, layer.shape, table_grid(layer).code_bits
        kind = _lookup_type(spec, x_TK.dtype)
        data_NB = tensors["qweight"].contiguous().view(torch.uint8)
        scale, tensor_scale = _scales(tensors["scale"], spec, kind), tensors.get("tensor_scale")
        table = blob[0].view(ENTRY[blob[0].shape[1]]).flatten()
        x, row = operand(x_TK), _block_of_row(layer)
        y_TN = x.new_empty(len(x), N)
        for rows in _slices(0, N, K, MULTIPLIED):
            W_RK = x_TK.new_empty(rows.stop - rows.start, K)
            for part in _slices(rows.start, rows.stop, K, DECODED):
                fields = _fields(data_NB[part], _field(bits, kind), K * bits)
                values = table.index_select(0, fields.flatten()).view(kind).view(len(fields), -1)[:, :K]
                own = scale if len(scale) == 1 else scale[part] if len(scale) == N else scale[row[part]]
                here = W_RK[part.start - rows.start : part.stop - rows.start]
                if kind == x_TK.dtype:
                    _times(values, own, spec, here)
                else:
                    _times(values, own, spec, values)
                    here.copy_(values if tensor_scale is None else values.mul_(tensor_scale))
            torch.mm(x, W_RK.to(x.dtype).T, out=y_TN[:, rows])
        return y_TN.to(x_TK.dtype)


@dataclass(frozen=True, slots=True)
class CodebookCpu:
    """`W = codebook[block, code]`, the bits of the reference: one lookup a code, no arithmetic."""

    name: ClassVar[str] = "table-cpu"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if (reason := _refuses(layer, device, dtype)) is not None:
            return reason
        return "blocks are ragged" if layer.shape[1] % layer.weights.block_size(layer.shape)[1] else None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """Nothing."""
        return []

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        (N, K), grid, (_, kb) = layer.shape, layer.weights.grid, layer.weights.blocks(layer.shape)
        assert isinstance(grid, CodebookGrid)  # noqa: S101  `holds` has checked it
        levels = tensors["codebook"].to(x_TK.dtype).flatten()
        row, first = _block_of_row(layer).int()[:, None, None], torch.arange(kb, dtype=torch.int32)[:, None]
        x = operand(x_TK)
        y_TN = x.new_empty(len(x), N)
        for rows in _slices(0, N, K, MULTIPLIED):
            W_RK = x_TK.new_empty(rows.stop - rows.start, K)
            for part in _slices(rows.start, rows.stop, K, DECODED):
                codes = unpack_bits(tensors["qweight"][part], grid.bits, K).int().view(-1, kb, K // kb)
                codes += (row[part] * kb + first) << grid.bits
                here = W_RK[part.start - rows.start : part.stop - rows.start]
                torch.index_select(levels, 0, codes.flatten(), out=here.view(-1))
            torch.mm(x, W_RK.to(x.dtype).T, out=y_TN[:, rows])
        return y_TN.to(x_TK.dtype)


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    return None if dtype == torch.bfloat16 else f"made for bfloat16, not {str(dtype).removeprefix('torch.')}"


@cache
def _lookup_type(spec: Spec, dtype: torch.dtype) -> torch.dtype:
    """x's type where products of values and scales in it are rounded once, as the reference rounds them."""
    grid, scale = spec.grid, spec.scale
    assert isinstance(grid, TableGrid)  # noqa: S101  `holds` has checked both
    assert isinstance(scale, FloatGrid)  # noqa: S101
    table = grid.table().nan_to_num(0, 0, 0)
    if spec.tensor_scale or not torch.equal(table.to(dtype).float(), table):
        return torch.float32
    return dtype if scale.torch_dtype in (torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn) else torch.float32


def _field(bits: int, kind: torch.dtype) -> int:
    """Bits of a field: tables of 16 bytes for each of 2^16 fields do not fit the cache."""
    return 8 if bits == 4 and kind.itemsize == 4 else FIELD[bits]


@cache
def _table(grid: TableGrid, kind: torch.dtype) -> Tensor:
    """`[2^field, bytes]`: the values of the codes of a field, the lowest bits first."""
    bits = grid.code_bits
    count = _field(bits, kind) // bits
    levels = F.pad(grid.table()[:, 0], (0, (1 << bits) - len(grid.table())))
    codes = torch.arange(1 << bits * count)[:, None] >> torch.arange(0, bits * count, bits) & ((1 << bits) - 1)
    return levels[codes].to(kind).contiguous().view(torch.uint8)


def _scales(scale: Tensor, spec: Spec, kind: torch.dtype) -> Tensor:
    """In `kind`; torch decodes bytes slowly, so they are looked up."""
    if scale.dtype.itemsize > 1:
        return scale.to(kind)
    assert isinstance(spec.scale, FloatGrid)  # noqa: S101  `holds` has checked it
    codes = scale.contiguous().view(torch.uint8).int().flatten()
    return _values(spec.scale.torch_dtype, kind).index_select(0, codes).view(scale.shape)


@cache
def _values(stored: torch.dtype, kind: torch.dtype) -> Tensor:
    """What the 256 bytes stand for in a type of 8 bits."""
    return torch.arange(256, dtype=torch.uint8).view(stored).float().to(kind)


def _fields(data_NB: Tensor, field: int, bits: int) -> Tensor:
    """The first `bits` bits of each row of bytes as numbers of `field` bits, int32; the last may reach beyond."""
    if field == 8:
        return data_NB[:, : -(-bits // 8)].int()
    step = {12: 3, 16: 2}[field]
    size = -(-bits // (8 * step)) * step
    data_NB = data_NB[:, :size] if data_NB.shape[1] >= size else F.pad(data_NB, (0, size - data_NB.shape[1]))
    if field == 16:
        return data_NB.contiguous().view(torch.int16).int().bitwise_and_(0xFFFF)
    first, middle, last = data_NB.unflatten(1, (-1, 3)).int().unbind(-1)
    return torch.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), -1).flatten(1)


def _times(values_RK: Tensor, scale: Tensor, spec: Spec, out_RK: Tensor) -> None:
    """`out = values * scale`, with the scales `[R, kb]` or `[1, kb]` of blocks of columns."""
    K, size = values_RK.shape[1], spec.block[1]
    if scale.shape[1] > 1 and K % size == 0:
        torch.mul(values_RK.unflatten(1, (-1, size)), scale[..., None], out=out_RK.unflatten(1, (-1, size)))
    else:
        scale = scale if scale.shape[1] == 1 else scale.repeat_interleave(size, 1)[:, :K]
        torch.mul(values_RK, scale, out=out_RK)


def _block_of_row(layer: Layer) -> Tensor:
    """Which row of blocks each row is in, `[N]`."""
    return torch.arange(layer.shape[0]) // layer.weights.block_size(layer.shape)[0]


def _slices(start: int, stop: int, K: int, weights: int) -> Iterator[slice]:
    step = max(1, weights // max(1, K))
    return (slice(i, min(stop, i + step)) for i in range(start, stop, step))
