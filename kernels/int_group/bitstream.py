"""Codes of 1 to 8 bits <-> a little-end-first bit stream in int32 words, along the last axis.

Code `i` occupies bits `[i*b, (i+1)*b)`; bit `j` of the stream is bit `j % 32` of word `j // 32`; the tail is zero.
Seen as bytes (little-endian machines, which is all torch runs on) the pattern repeats every 8 codes = b bytes and a
code touches at most two bytes, so the loops below are 8 whole-tensor steps for every width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """`[..., K]` uint8 codes -> `[..., words(K, bits)]` int32."""
    count = codes.shape[-1]
    codes = F.pad(codes, (0, -count % 32)).unflatten(-1, (-1, 8))
    stream = codes.new_zeros(*codes.shape[:-1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= codes[..., i] << shift
        if shift + bits > 8:  # the code straddles two bytes
            stream[..., byte + 1] |= codes[..., i] >> (8 - shift)
    stream = stream.flatten(-2).view(torch.int32)[..., : words(count, bits)]
    return stream.clone(
        memory_format=torch.contiguous_format
    )  # `contiguous()` leaves a single word the strides of many


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` codes of each row as uint8."""
    # flat first: a transposed single column counts as contiguous and still cannot be viewed as bytes
    data = stream.contiguous().flatten().view(torch.uint8).unflatten(0, (*stream.shape[:-1], 4 * stream.shape[-1]))
    if 8 % bits == 0:
        return _spread(data, bits)[..., :count]
    data = F.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty(*data.shape[:-1], 8, dtype=torch.uint8, device=data.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code |= data[..., byte + 1] << (8 - shift)
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]


def take_bits(stream: Tensor, bits: int, index: Tensor) -> Tensor:
    """The codes at `index` `[T]` of each row: `[..., T]` uint8, without unpacking the others."""
    first = index * bits
    word = torch.stack([first // 32, ((first + bits - 1) // 32)])
    low, high = (stream[..., w].long() & 0xFFFFFFFF for w in word)
    both = low | (high << 32)  # where the code sits in one word the other half is shifted out or masked away
    return (both >> (first % 32) & ((1 << bits) - 1)).to(torch.uint8)


def _spread(data: Tensor, bits: int) -> Tensor:
    """Bytes of `8 / bits` codes each -> a byte for each code, for widths that divide 8.

    A byte becomes an integer as wide as its codes will be; its halves, then quarters, then eighths move apart. Every
    step runs over contiguous memory: 10x faster than one code at a time.
    """
    if bits == 8:
        return data
    codes = data.to({4: torch.int16, 2: torch.int32, 1: torch.int64}[bits])
    together = 8 // bits
    while together > 1:
        together //= 2  # codes that stay next to each other
        field = (1 << (bits * together)) - 1
        mask = sum(field << start for start in range(0, 64 // bits, 8 * together))
        codes = (codes << ((8 - bits) * together)).bitwise_or_(codes).bitwise_and_(mask)
    return codes.view(torch.uint8)
