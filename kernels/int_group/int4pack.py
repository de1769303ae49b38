"""torch's 4-bit layout on CPU, and back: column by column, two rows a byte.

Rows come in blocks. Which two rows of a block share a byte depends on the processor, so it is not written here: it is
read off a small block that says which row is where.
"""

from functools import cache

import torch
from torch import Tensor

BLOCKS = (64, 32)  # rows of a block, by processor; the last block of a matrix may be shorter


def pack(codes_NK: Tensor) -> Tensor:
    """uint8 codes `[N, K]` of 4 bits -> `[N, K / 2]` bytes, some rows at a time."""
    step = max(1, (1 << 20) // max(1, codes_NK.shape[1] * BLOCKS[0])) * BLOCKS[0]
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return torch.cat([convert(codes_NK[i : i + step].int(), 2) for i in range(0, len(codes_NK), step)])


def columns(packed: Tensor, some: slice = slice(None)) -> Tensor:
    """The codes of rows that begin with a block and end with one, or with the matrix: uint8 `[K, N]`.

    `some` of the K columns.
    """
    N, K = packed.shape[0], 2 * packed.shape[1]
    whole = N - N % block()
    found = []
    for part, rows in ((packed[:whole], block()), (packed[whole:], N - whole)):
        if len(part):
            data = part.reshape(-1, K, rows // 2)[:, some]
            codes = torch.cat((data & 15, data >> 4), 2)
            order = _places(rows)
            codes = codes if order == tuple(range(rows)) else codes[..., list(order)]
            found.append(codes.transpose(0, 1).reshape(data.shape[1], -1))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def differences(packed: Tensor, zero_GN: Tensor) -> Tensor:
    """`code - zero` of such rows, bfloat16 `[G, K / G, N]`, exact for integer zeros: two lookups for two bytes."""
    G, N, K = len(zero_GN), packed.shape[0], 2 * packed.shape[1]
    rows, half = block(), block() // 2
    if N % rows or _rows(rows) != tuple(range(rows)):
        return columns(packed).to(torch.bfloat16).view(G, K // G, N).sub_(zero_GN[:, None])
    word = packed.reshape(-1).view(torch.int16).int().bitwise_and_(0xFFFF)
    W_GKN = torch.empty(G, K // G, N, dtype=torch.bfloat16)
    out, zero = W_GKN.view(G, K // G, -1, 2, half), zero_GN.reshape(G, 1, -1, 2, half)
    for part, table in enumerate(_tables()):
        codes = table.index_select(0, word).view(torch.bfloat16).view(-1, G, K // G, half)
        torch.sub(codes.permute(1, 2, 0, 3), zero[..., part, :], out=out[..., part, :])
    return W_GKN


@cache
def _tables() -> tuple[Tensor, Tensor]:
    """Two bytes -> the codes in their low halves, and those in their high ones: two bfloat16 as an int32."""
    word = torch.arange(1 << 16)
    low, high = (torch.stack((word >> i & 15, word >> i + 8 & 15), -1).bfloat16() for i in (0, 4))
    return low.view(torch.int32).flatten(), high.view(torch.int32).flatten()


@cache
def block() -> int:
    """Rows of a block on this processor."""
    return next(rows for rows in BLOCKS if sorted(_rows(rows)) == list(range(rows)))


@cache
def _rows(rows: int) -> tuple[int, ...]:
    """The rows in the low halves of a column's bytes, then in the high ones."""
    number = torch.arange(rows)[:, None].expand(rows, 32).int()
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    low, high = (convert(digit.contiguous(), 2).flatten()[: rows // 2].int() for digit in (number & 15, number >> 4))
    return tuple(torch.cat(((low & 15) | (high & 15) << 4, (low >> 4) | (high >> 4) << 4)).tolist())


@cache
def _places(rows: int) -> tuple[int, ...]:
    """Where each row of a block is: the inverse of `_rows`."""
    return tuple(sorted(range(rows), key=_rows(rows).__getitem__))
