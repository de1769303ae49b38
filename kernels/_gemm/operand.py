"""Operand: a packed weight as the main loop takes it, with the static facts it is compiled for."""

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.kernels._gemm.words import Shuffle

RangesOf = Literal["scales", "scales_and_zeros", "pairs", "powers", "small_floats"]

TABLES = ("levels", "scaled_levels", "codebooks")

# what `loop.SPAN` says
WHOLE_ROW, BLOCK, PLANE, ELEMENT = range(4)


@dataclass(frozen=True, slots=True)
class Weight:
    """What is known of a weight before its values: what a kernel is compiled and tuned for.

    Attributes:
        shape: (N, K).
        bits: of a code in the words.
        group: columns that share a scale.
        decode: name of the function of decode.py that makes weights of words.
        ranges: name of the one that loads scales and zero points.
        zero: the zero point where it is a constant, None where zero points are loaded or there is none.
        unit: neighbours of a row in one thread, see `unit_for`.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    decode: str = "integers"
    ranges: RangesOf = "scales"
    zero: int | None = None
    unit: int = 2

    @property
    def shuffle(self) -> Shuffle:
        """How the codes lie."""
        return Shuffle(self.bits, self.unit)

    @property
    def span(self) -> int:
        """How finely groups cut a slice."""
        if self.group >= self.shape[1]:
            return WHOLE_ROW
        common = gcd(self.group, self.shuffle.slice)
        return BLOCK if common == self.shuffle.slice else PLANE if common % (8 * self.unit) == 0 else ELEMENT

    def slice(self, tokens: int, columns: int) -> int | None:
        """Columns to be multiplied at once where the scale may join behind their product, else None.

        16 bits hold differences of codes and zero points, and small floats. The scale is then a multiply-add for each
        token and range of a turn of so many columns, before it is half an instruction a weight: it pays where a range
        has 4 times the tokens. No more than two slices are of one word.
        """
        if self.decode != "mxfp4" and (self.decode != "integers" or self.ranges not in ("pairs", "scales")):
            return None
        group, whole = self.group if self.span != WHOLE_ROW else columns, self.shuffle.slice
        pays = gcd(group, columns) >= 4 * tokens and gcd(group, whole) >= max(whole // 2, 32)
        return gcd(group, whole) if pays else None

    def ptx(self, dtype: torch.dtype, backend: str, *, after: bool = False) -> bool:
        """Whether inline PTX decodes it: exact in 16 bits, groups that do not part a pair, an NVIDIA target."""
        if backend != "cuda":
            return False
        if self.decode in TABLES:
            return True
        if dtype not in (torch.bfloat16, torch.float16) or (self.span == ELEMENT and not after):
            return False
        if self.decode == "mxfp4":
            return dtype == torch.bfloat16
        return self.decode == "integers" and (self.ranges == "pairs" or (after and self.zero is not None))


def unit_for(target: str, group: int, K: int) -> int:
    """Neighbours of a row in one thread of a 16-bit product: what spares the machine every exchange between threads.

    Triton gives Ampere's (and small Blackwells') instructions 4 when the operand is made of narrower numbers. Only
    where a group holds the columns of a plane, which are 8 units.
    """
    return 4 if target.startswith(("sm_8", "sm_12")) and (group >= K or group % 32 == 0) else 2


MAGIC = {torch.bfloat16: 0xC300, torch.float16: 0xE400}  # -128 and -1024: see decode.integers_ptx


def affine_ranges(
    scale_NG: Tensor, zero_NG: Tensor | None, rows: int, dtype: torch.dtype, *, zero: int = 0
) -> list[Tensor]:
    """[scale and zero point in one word], or [scales], or [scales, zero points]: each `[G, N]`.

    So the rows of a tile are neighbours. A word has room for a scale that `dtype` holds exactly; above it lies the
    number `-(128 + zero point)` (float16: 1024) in `dtype`. Which it is tells `ranges_of`. `zero`: where `zero_NG` is
    None.
    """
    scale = scale_NG.expand(rows, -1).T.float()
    narrow = scale.to(dtype)
    if dtype in MAGIC and torch.equal(narrow.float(), scale):
        above = MAGIC[dtype] + (torch.full_like(scale, zero) if zero_NG is None else zero_NG.expand(rows, -1).T).long()
        word = (narrow.contiguous().view(torch.int16).long() & 0xFFFF) | (above << 16)
        return [torch.where(word >= 1 << 31, word - (1 << 32), word).int().contiguous()]
    if zero_NG is None:
        return [scale.contiguous()]
    return [scale.contiguous(), zero_NG.expand(rows, -1).T.float().contiguous()]


def ranges_of(blob: list[Tensor]) -> RangesOf:
    """Which range function reads what `affine_ranges` made (behind the words)."""
    if len(blob) > 2:
        return "scales_and_zeros"
    return "pairs" if blob[1].dtype == torch.int32 else "scales"


def table_of(levels: Tensor, weight: Weight, whole: Tensor) -> Tensor:
    """What `weight.decode` looks up, float32 `[2^bits]`; for "scaled_levels" `[2^(bits + 1)]`, the scale of the tensor
    behind the levels. So tables of many experts, one behind the other, begin at multiples of their size.
    """
    table = F.pad(levels, (0, (1 << weight.bits) - len(levels)))
    if weight.decode == "levels":
        return table
    return F.pad(torch.cat((table, whole)), (0, len(table) - 1))


def byte_ranges(bytes_NG: Tensor, rows: int) -> Tensor:
    """uint8 `[N or 1, G]` -> int32 `[G / 4, N]`: four neighbours along K in one word."""
    padded = F.pad(bytes_NG.expand(rows, -1), (0, -bytes_NG.shape[1] % 4)).contiguous()
    return padded.view(torch.int32).T.contiguous()
