"""Codes in blocks of 16 outputs x 8 inputs, so that a load has what one instruction multiplies; and back.

Tokens in bfloat16 are multiplied two inputs at a time, integers four. Within a block:

    4 bits, bfloat16   word (output, i % 2) holds input i's code at bit 4 (i // 2)
    4 bits, integers   byte (output, i % 4) holds it at bit 4 (i // 4)
    8 bits, bfloat16   byte (i // 2, output, i % 2)
    8 bits, integers   byte (i // 4, output, i % 4)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS, INPUTS = 16, 8


def pack(codes_NK: Tensor, bits: int, *, integers: bool) -> Tensor:
    """uint8 codes -> uint8 `[N / 16, K / 8, 16 bits]`, both rounded up; what is added is code 0."""
    N, K = codes_NK.shape
    padded = F.pad(codes_NK, (0, -K % INPUTS, 0, -N % OUTPUTS))
    each = 4 if integers else 2
    # [N / 16, K / 8, i // each, output, i % each]
    parts = padded.view(-1, OUTPUTS, padded.shape[1] // INPUTS, INPUTS // each, each).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return parts.flatten(2).contiguous()
    if integers:
        return (parts[:, :, 0] | parts[:, :, 1] << 4).flatten(2).contiguous()
    low, high = parts[:, :, 0] | parts[:, :, 1] << 4, parts[:, :, 2] | parts[:, :, 3] << 4
    return torch.stack((low, high), -1).flatten(2)


def unpack(words: Tensor, bits: int, *, integers: bool) -> Tensor:
    """The inverse, for any of the blocks: uint8 `[16 NB, 8 KB]`."""
    NB, KB, _ = words.shape
    each = 4 if integers else 2
    if bits == 8:
        parts = words.view(NB, KB, INPUTS // each, OUTPUTS, each)
    elif integers:
        held = words.view(NB, KB, OUTPUTS, each)
        parts = torch.stack((held & 15, held >> 4), 2)
    else:
        low, high = words.view(NB, KB, OUTPUTS, each, 2).unbind(-1)
        parts = torch.stack((low & 15, low >> 4, high & 15, high >> 4), 2)
    return parts.permute(0, 3, 1, 2, 4).reshape(NB * OUTPUTS, KB * INPUTS)
