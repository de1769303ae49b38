"""Codes in blocks of 16 outputs x 8 inputs, so that a load has what one instruction multiplies; and back.

Tokens in bfloat16 are multiplied two inputs at a time, integers four. Within a block:

    4 bits, bfloat16   word (output, i % 2) holds input i's code at bit 4 (i // 2)
    4 bits, integers   byte (output, i % 4) holds it at bit 4 (i // 4)
    8 bits, bfloat16   byte (i // 2, output, i % 2)
    8 bits, integers   byte (i // 4, output, i % 4)

Codes that mean something else for every output lie in blocks of 8 outputs x 128 inputs, a load being one output's:

    4 bits, rows       word (output, i % 32) holds input i's code at bit 4 (i // 32)
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# How codes meet tokens: a table of 16 values in bfloat16 (their products with scales, too: scaled4), of values that are
# none, or one for every output; a table of 256; signed bytes; or the codes themselves, with integer tokens.
Kind = Literal["levels4", "scaled4", "floats4", "rows4", "levels8", "bytes8", "integers4", "integers8"]
KINDS: tuple[Kind, ...] = ("levels4", "scaled4", "floats4", "rows4", "levels8", "bytes8", "integers4", "integers8")
OUTPUTS = 16  # their number is rounded up to a multiple of this


def block(kind: Kind) -> tuple[int, int]:
    """(outputs, inputs)."""
    return (8, 128) if kind == "rows4" else (16, 8)


def pack(codes_NK: Tensor, kind: Kind) -> Tensor:
    """uint8 codes -> uint8 `[blocks down, blocks across, bytes of a block]`; what is added is code 0."""
    outputs, inputs = block(kind)
    each = _each(kind)
    padded = F.pad(codes_NK, (0, -codes_NK.shape[1] % inputs, 0, -len(codes_NK) % OUTPUTS))
    blocks = padded.view(len(padded) // outputs, outputs, -1, inputs).transpose(1, 2)
    parts = blocks.view(*blocks.shape[:3], -1, each)  # [..., output, i // each, i % each]
    if kind.endswith("8"):
        return parts.transpose(2, 3).flatten(2).contiguous()
    if kind == "integers4":
        return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).flatten(2)
    low, high = parts[:, :, :, 0] | parts[:, :, :, 1] << 4, parts[:, :, :, 2] | parts[:, :, :, 3] << 4
    return torch.stack((low, high), -1).flatten(2)


def unpack(words: Tensor, kind: Kind) -> Tensor:
    """The inverse, for any of the blocks: uint8 `[outputs, inputs]`."""
    (NB, KB, _), (outputs, inputs), each = words.shape, block(kind), _each(kind)
    if kind.endswith("8"):
        parts = words.view(NB, KB, -1, outputs, each).transpose(2, 3)
    elif kind == "integers4":
        held = words.view(NB, KB, outputs, each)
        parts = torch.stack((held & 15, held >> 4), 3)
    else:
        low, high = words.view(NB, KB, outputs, each, 2).unbind(-1)
        parts = torch.stack((low & 15, low >> 4, high & 15, high >> 4), 3)
    return parts.flatten(3).transpose(1, 2).reshape(NB * outputs, KB * inputs)


def _each(kind: Kind) -> int:
    """Inputs side by side in a block."""
    return 32 if kind == "rows4" else 4 if kind.startswith("integers") else 2
