"""Grids: finite sets of representable values, as frozen data.

Legend of shape suffixes, used everywhere: `W_NK` weight (N outputs, K inputs), `x_TK` activations (T tokens),
`H_KK` input Gram matrix, `G` groups along K, `R` rank, `E` experts, `B` batch, `S` sequence.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant.errors import ConfigError


@runtime_checkable
class Grid(Protocol):
    """A finite set of values with a code for each.

    Invariants: `encode(decode(c)) == c` for every code; `decode(encode(x))` is a nearest grid value to `x`.
    """

    @property
    def vector(self) -> int:
        """Values per code: 1 for a scalar grid."""

    @property
    def bits(self) -> float:
        """Bits per value."""

    def encode(self, x: Tensor) -> Tensor:
        """[..., K] values -> [..., K / vector] codes of the nearest grid points."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 values."""


@dataclass(frozen=True, slots=True)
class IntGrid:
    """The integers of `bits` bits: `-2^(b-1) .. 2^(b-1)-1` when signed, else `0 .. 2^b-1`.

    A code is the value minus `low`, so codes are always `0 .. 2^b-1` (uint8).
    """

    bits: int
    signed: bool = False
    vector: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r}: an integer grid has 1 to 8 bits")

    @property
    def low(self) -> int:
        """The smallest value."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value."""
        return self.low + (1 << self.bits) - 1

    def encode(self, x: Tensor) -> Tensor:
        """Nearest integers (ties to even), clamped, as uint8 codes."""
        return x.round().clamp(self.low, self.high).sub(self.low).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 codes -> float32 integers."""
        return codes.to(torch.float32).add(self.low)


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The finite values of a torch float type; a code is the value in that type. Used for scales."""

    dtype: str = "bfloat16"
    vector: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not getattr(getattr(torch, self.dtype, None), "is_floating_point", False):
            raise ConfigError(f"{self.dtype!r} is not a torch floating point type")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of the codes."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)  # noqa: S101  __post_init__ has checked it
        return dtype

    @property
    def bits(self) -> int:
        """Bits per value."""
        return self.torch_dtype.itemsize * 8

    def encode(self, x: Tensor) -> Tensor:
        """Round to nearest even, saturating at the largest finite value."""
        top = torch.finfo(self.torch_dtype).max
        return x.clamp(-top, top).to(self.torch_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values in float32."""
        return codes.to(torch.float32)


@dataclass(frozen=True, slots=True)
class LevelGrid:
    """An ascending table of levels (NF4, FP4, k-means codebooks); a code is the level's index (uint8)."""

    levels: tuple[float, ...]
    vector: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))  # JSON hands us a list
        if not 2 <= len(self.levels) <= 256 or list(self.levels) != sorted(set(self.levels)):
            raise ConfigError("a level grid needs 2 to 256 distinct ascending levels")

    @property
    def bits(self) -> int:
        """Bits per value."""
        return (len(self.levels) - 1).bit_length()

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest level (the lower one on a tie)."""
        table = x.new_tensor(self.levels)
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 levels."""
        return torch.tensor(self.levels, device=codes.device)[codes.int()]


@dataclass(frozen=True, slots=True)
class DynamicGrid:
    """The 256 values of the signed dynamic data type, in [-1, 1] (arXiv 1511.04561; scales of QLoRA's double quant).

    Decade `10^-i`, `i = 0..6`, holds the midpoints of `2^(6-i)` equal parts of [0.1, 1] with both signs; 0 and 1 are
    added. A code is the rank of the value (uint8).
    """

    bits: ClassVar[int] = 8
    vector: ClassVar[int] = 1

    def encode(self, x: Tensor) -> Tensor:
        """Rank of the nearest value (the lower one on a tie)."""
        table = _dynamic_values().to(x.device)
        return torch.bucketize(x.float(), (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 values."""
        return _dynamic_values().to(codes.device)[codes.int()]


@cache
def _dynamic_values() -> Tensor:
    parts = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = torch.cat([10.0 ** (i - 6) * ((p[1:] + p[:-1]) / 2) for i, p in enumerate(parts)])
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


GRIDS: dict[str, type[Any]] = {c.__name__: c for c in (IntGrid, FloatGrid, LevelGrid, DynamicGrid)}


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """`{"type": name, **fields}`."""
    return {"type": type(grid).__name__, **asdict(grid)}  # type: ignore[call-overload]


def grid_from_json(data: dict[str, Any]) -> Grid:
    """Inverse of `grid_to_json`.

    Raises:
        ConfigError: unknown type or field.
    """
    fields = dict(data)
    kind = fields.pop("type", None)
    if kind not in GRIDS:
        raise ConfigError(f"unknown grid type {kind!r}; known: {sorted(GRIDS)}")
    try:
        grid: Grid = GRIDS[kind](**fields)
    except TypeError as error:
        raise ConfigError(f"grid {kind}: {error}") from None
    return grid
