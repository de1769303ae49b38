"""Codes <-> the words a GPU reads: shuffled so that one 16-byte load is a thread's share of several matrix fragments.

A block is 16 rows by `16 planes` columns. It has 64 slots (8 columns j, 8 rows g, two halves of both: what one warp's
tensor core instruction takes as its left operand), and each slot holds `P` words of 32 bits for 2 x `planes` codes:
bit field `i` of the low half is plane i of the even column of a pair, of the high half that of the odd one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, SLOTS, LANES = 16, 8, 128  # rows of a block, slots in a row of it, words of a block and part
PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}  # 5 and 7 bits take the room of 6 and 8
SLICE = 1 << 22  # codes shuffled at once


@dataclass(frozen=True, slots=True)
class Shuffle:
    """How codes of `bits` bits lie in words. `unit` neighbours along K are neighbours in a thread: 2, 4 or 8, what the
    machine's matrix instructions want.
    """

    bits: int
    unit: int = 2

    @property
    def parts(self) -> tuple[int, ...]:
        """The widths a code is cut into, lowest bits first: powers of two, so that no field crosses a word."""
        return PARTS[self.bits]

    @property
    def planes(self) -> int:
        """Codes of a slot and half: as many as the narrowest part has in 16 bits."""
        return 16 // self.parts[-1]

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return 16 * self.planes

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
        words, low = [], 0
        for width in self.parts:
            fields = ((codes >> low) & ((1 << width) - 1)).unflatten(2, (-1, 16 // width))  # [.., word, field, e, 128]
            field = torch.arange(16 // width, device=codes.device)[:, None, None]
            half = torch.arange(2, device=codes.device)[:, None]
            words.append((fields << (width * field + 16 * half)).sum((3, 4)))
            low += width
        packed = torch.cat(words, 2)
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()

    def _unpack(self, words: Tensor, K: int) -> Tensor:
        (nb, kb), low, first = words.shape[:2], 0, 0
        codes = torch.zeros((), dtype=torch.uint8, device=words.device)
        half = 16 * torch.arange(2, device=words.device)[:, None]
        for width in self.parts:
            fields, count = 16 // width, self.planes * width // 16
            shift = width * torch.arange(fields, device=words.device)[:, None, None] + half
            part = words[:, :, first : first + count, None, None] >> shift & ((1 << width) - 1)
            codes, low, first = codes | part.to(torch.uint8).flatten(2, 3) << low, low + width, first + count
        codes = codes.reshape(nb, kb, self.planes, 2, 8, 4, 2, 2)  # block, plane, e, g, t, k half, row half
        codes = codes.permute(0, 7, 4, 1, 2, 6, 5, 3)
        codes = codes.reshape(nb, 2, 8, kb, 2 * self.planes // self.unit, self.unit // 2, 2, 4, 2)
        codes = codes.permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
        return codes.reshape(nb * ROWS, kb * self.columns)[:, :K]
