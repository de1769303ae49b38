"""Codes <-> the words a GPU reads: shuffled so that one 16-byte load is a thread's share of several matrix fragments.

A block is 16 rows by `16 planes` columns. It has 64 slots (8 columns j, 8 rows g, two halves of both: what one warp's
tensor core instruction takes as its left operand), and each slot holds words of 32 bits for 2 x `planes` codes: those
of the low halves are of the even columns of pairs, of the high halves of the odd ones, one pair a plane.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, SLOTS, LANES = 16, 8, 128  # rows of a block, slots in a row of it, words of a block of one word a slot
PLANES = {1: 16, 2: 8, 3: 16, 4: 4, 6: 8, 8: 2}  # codes of a slot and half; 5 and 7 bits take the room of 6 and 8
SLICE = 1 << 22  # codes shuffled at once


@dataclass(frozen=True, slots=True)
class Field:
    """Bits of the code of a plane, from the `low`-th on: `width` of them, from `place` on in each half of a word."""

    plane: int
    low: int
    width: int
    word: int
    place: int


@cache
def fields(bits: int) -> tuple[Field, ...]:
    """Where codes of so many bits lie in the halves of words, the lowest first.

    Of 3 and 6 bits, which leave some of 16 over, half of the planes have a word of their own and 8 bits of each half of
    a third: whole codes in both, and one of what is left of both.
    """
    if bits not in (3, 6):
        return tuple(Field(p, 0, bits, 0, bits * p) for p in range(PLANES[bits]))
    each, rest, found = 16 // bits, 16 % bits, []
    for word in range(2):
        first, last = word * PLANES[bits] // 2, (word + 1) * PLANES[bits] // 2 - 1
        found += [Field(first + i, 0, bits, word, bits * i) for i in range(each)]
        found += [Field(first + each + i, 0, bits, 2, 8 * word + bits * i) for i in range(8 // bits)]
        found += [Field(last, 0, rest, word, bits * each), Field(last, rest, bits - rest, 2, 8 * word + 6)]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Shuffle:
    """How codes of `bits` bits lie in words. `unit` neighbours along K are neighbours in a thread: 2, 4 or 8, what the
    machine's matrix instructions want.
    """

    bits: int
    unit: int = 2

    @property
    def planes(self) -> int:
        """Codes of a slot and half."""
        return PLANES[self.bits]

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return 16 * self.planes

    @property
    def slice(self) -> int:
        """Columns decoded and multiplied at once: those of a word (and 8 bits of another)."""
        return self.columns // 2 if self.words == 3 else self.columns

    @property
    def words(self) -> int:
        """Words of a slot."""
        return self.planes * self.bits // 16

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Blocks along N and K, the last ones padded with zero codes."""
        return -(-shape[0] // ROWS), -(-shape[1] // self.columns)

    def pack(self, codes_NK: Tensor) -> Tensor:
        """uint8 `[N, K]` -> int32 `[N / 16, K / columns, words, 128]`, some rows at a time."""
        step = self._blocks_at_once(codes_NK.shape[1]) * ROWS
        return torch.cat([self._pack(codes_NK[start : start + step]) for start in range(0, len(codes_NK), step)])

    def unpack(self, words: Tensor, shape: tuple[int, int]) -> Tensor:
        """Inverse of `pack`: the codes again, uint8 `[N, K]`."""
        step = self._blocks_at_once(shape[1])
        parts = [self._unpack(words[start : start + step], shape[1]) for start in range(0, len(words), step)]
        return torch.cat(parts)[: shape[0]]

    def _blocks_at_once(self, K: int) -> int:
        return max(1, SLICE // (ROWS * max(1, K)))

    def _pack(self, codes_NK: Tensor) -> Tensor:
        (N, K), (nb, kb) = codes_NK.shape, self.blocks((codes_NK.shape[0], codes_NK.shape[1]))
        codes = F.pad(codes_NK, (0, kb * self.columns - K, 0, nb * ROWS - N))
        codes = codes.reshape(nb, 2, 8, kb, 2 * self.planes // self.unit, 2, 4, self.unit // 2, 2).permute(
            0, 1, 2, 3, 4, 7, 5, 6, 8
        )
        codes = codes.reshape(nb, 2, 8, kb, self.planes, 2, 4, 2)  # block, row half, g, block, plane, k half, t, e
        codes = codes.permute(0, 3, 4, 7, 2, 6, 5, 1).reshape(nb, kb, self.planes, 2, LANES).long()
        packed = codes.new_zeros(nb, kb, self.words, LANES)
        half = 16 * torch.arange(2, device=codes.device)[:, None]
        for f in fields(self.bits):
            packed[:, :, f.word] += ((codes[:, :, f.plane] >> f.low & (1 << f.width) - 1) << f.place + half).sum(2)
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()

    def _unpack(self, words: Tensor, K: int) -> Tensor:
        nb, kb = words.shape[:2]
        codes = torch.zeros(nb, kb, self.planes, 2, LANES, dtype=torch.uint8, device=words.device)
        half = 16 * torch.arange(2, device=words.device)[:, None]
        for f in fields(self.bits):
            part = words[:, :, f.word, None] >> f.place + half & (1 << f.width) - 1
            codes[:, :, f.plane] |= part.to(torch.uint8) << f.low
        codes = codes.reshape(nb, kb, self.planes, 2, 8, 4, 2, 2)  # block, plane, e, g, t, k half, row half
        codes = codes.permute(0, 7, 4, 1, 2, 6, 5, 3)
        codes = codes.reshape(nb, 2, 8, kb, 2 * self.planes // self.unit, self.unit // 2, 2, 4, 2)
        codes = codes.permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
        return codes.reshape(nb * ROWS, kb * self.columns)[:, :K]
