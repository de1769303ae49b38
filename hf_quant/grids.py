"""Grids: finite sets of representable values, as frozen data.

Legend of shape suffixes, used everywhere: `W_NK` weight (N outputs, K inputs), `x_TK` activations (T tokens),
`H_KK` input Gram matrix, `G` groups along K, `R` rank, `E` experts, `B` batch, `S` sequence.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors.torch import load
from torch import Tensor

from hf_quant.errors import ConfigError, UnsupportedSpec

CHUNK = 1 << 14  # vectors that are compared with all points of a grid at once


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


@runtime_checkable
class TableGrid(Grid, Protocol):
    """A grid whose values are a table that everybody knows: decoding is `table()[code]`."""

    @property
    def code_bits(self) -> int:
        """Bits per code: `bits * vector`."""

    def table(self) -> Tensor:
        """float32 `[codes, vector]`, on the CPU; at most 256 codes."""


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
        codes = x.round().clamp_(self.low, self.high)
        return (codes.sub_(self.low) if self.low else codes).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 codes -> float32 integers."""
        values = codes.to(torch.float32)
        return values + self.low if self.low else values


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

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return self.bits

    def table(self) -> Tensor:
        """The levels, `[levels, 1]`."""
        return torch.tensor(self.levels, device="cpu")[:, None]

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest level (the lower one on a tie)."""
        table = x.new_tensor(self.levels)
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 levels."""
        return torch.tensor(self.levels, device=codes.device)[codes.int()]


@dataclass(frozen=True, slots=True)
class MiniFloatGrid:
    """Floats of one sign bit, `exponent` bits E and `mantissa` bits M; a code is the bit pattern (uint8).

        value = (-1)^s 2^(max(e, 1) - bias) (m / 2^M + [e > 0]),   bias = max(2^(E - 1) - 1, 0)

    Zero has two codes. `top` is the largest finite value where patterns above it are infinite or NaN (448 in E4M3,
    whose codes are then the bytes of torch.float8_e4m3fn); None: every pattern is a value (OCP's E2M1, E2M3, E3M2).
    """

    exponent: int
    mantissa: int
    top: float | None = None
    vector: ClassVar[int] = 1

    def __post_init__(self) -> None:
        whole = type(self.exponent) is int and type(self.mantissa) is int
        if not whole or self.exponent < 1 or self.mantissa < 0 or not 2 <= 1 + self.exponent + self.mantissa <= 8:
            raise ConfigError(
                f"E{self.exponent}M{self.mantissa}: at least one exponent bit, and 2 to 8 bits with the sign"
            )
        if self.top is not None and self.top not in _mini_floats(self.exponent, self.mantissa, None):
            raise ConfigError(f"top={self.top!r} is no value of E{self.exponent}M{self.mantissa}")

    @property
    def bits(self) -> int:
        """Bits per value."""
        return 1 + self.exponent + self.mantissa

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return self.bits

    @property
    def high(self) -> float:
        """The largest value."""
        return (
            float(_mini_floats(self.exponent, self.mantissa, None)[: 1 << (self.bits - 1)][-1])
            if self.top is None
            else self.top
        )

    def table(self) -> Tensor:
        """The values in the order of their codes, `[codes, 1]`; NaN beyond `top`."""
        return torch.tensor(_mini_floats(self.exponent, self.mantissa, self.top), device="cpu")[:, None]

    def encode(self, x: Tensor) -> Tensor:
        """Round to nearest, ties to the even mantissa, saturating."""
        x = x.float().contiguous()
        size, sign = x.abs().clamp_max(self.high), x.view(torch.int32) < 0
        lowest = 1 - _bias(self.exponent)  # of the exponents; it has the step of the subnormals too
        e = (size.view(torch.int32) >> 23).sub_(127).clamp_min_(lowest)
        steps = size / ((e + (127 - self.mantissa)) << 23).view(torch.float32)
        # a rounding up to the next power of two carries from the mantissa into the exponent by itself
        code = steps.round_().to(torch.int32) + ((e - lowest) << self.mantissa)
        return (code + (sign.to(torch.int32) << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 values."""
        return self.table().to(codes.device).flatten()[codes.int()]


def _bias(exponent: int) -> int:
    return max((1 << (exponent - 1)) - 1, 0)


@cache
def _mini_floats(exponent: int, mantissa: int, top: float | None) -> tuple[float, ...]:
    """The value of every code."""
    positive = [
        2.0 ** (max(e, 1) - _bias(exponent)) * (m / (1 << mantissa) + (e > 0))
        for e in range(1 << exponent)
        for m in range(1 << mantissa)
    ]
    positive = [v if top is None or v <= top else float("nan") for v in positive]
    return (*positive, *(-v for v in positive))


E4M3 = MiniFloatGrid(4, 3, 448.0)
E5M2 = MiniFloatGrid(5, 2, 57344.0)


@dataclass(frozen=True, slots=True)
class GaussianGrid:
    """`size` points of `vector` dimensions with the least mean squared error for a standard Gaussian (Lloyd, HIGGS).

    The points lie in `gaussian_grids.safetensors` beside this file; a code is a point's place there (uint8).
    """

    size: int
    vector: int

    def __post_init__(self) -> None:
        if f"{self.vector}x{self.size}" not in _gaussian_tables():
            known = ", ".join(sorted(_gaussian_tables()))
            raise ConfigError(f"there is no grid of {self.size!r} points in {self.vector!r} dimensions; known: {known}")

    @property
    def bits(self) -> float:
        """Bits per value."""
        return self.code_bits / self.vector

    @property
    def code_bits(self) -> int:
        """Bits per code."""
        return (self.size - 1).bit_length()

    def table(self) -> Tensor:
        """The points, `[size, vector]`."""
        return _gaussian_tables()[f"{self.vector}x{self.size}"]

    def encode(self, x: Tensor) -> Tensor:
        """Place of the nearest point, `[..., K] -> [..., K / vector]`."""
        points = self.table().to(x.device)
        half = points.square().sum(1) / 2
        vectors = x.float().reshape(-1, self.vector)
        codes = [(part @ points.T - half).argmax(1).to(torch.uint8) for part in vectors.split(CHUNK)]
        return torch.cat(codes).reshape(*x.shape[:-1], -1) if codes else x.new_empty(0, dtype=torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> float32 values, `[..., K / vector] -> [..., K]`."""
        return self.table().to(codes.device)[codes.int()].flatten(-2)


@cache
def _gaussian_tables() -> dict[str, Tensor]:
    """ "vector x size" -> points. Part of saved models: never change them."""
    with torch.device("cpu"):  # models are built inside torch.device("meta")
        stored = load((Path(__file__).with_name("gaussian_grids.safetensors")).read_bytes())
    return {name: points.float() for name, points in stored.items()}


@dataclass(frozen=True, slots=True)
class CodebookGrid:
    """`2^bits` levels for each block of a matrix, stored with it (`QTensor.codebook`); a code is its level's rank.

    Without the matrix it cannot say what a code means: `qtensor.lookup` and `codebooks.fit_codebooks` do.
    """

    bits: int
    vector: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r}: a codebook has codes of 1 to 8 bits")

    def encode(self, x: Tensor) -> Tensor:
        """Refused.

        Raises:
            UnsupportedSpec: always; see the class.
        """
        raise UnsupportedSpec("codebooks are fitted to the weights; use a solver that does this, such as squeezellm's")

    def decode(self, codes: Tensor) -> Tensor:
        """Refused.

        Raises:
            UnsupportedSpec: always; see the class.
        """
        raise UnsupportedSpec("codes of a codebook mean nothing without the matrix they were stored with")


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


GRIDS: dict[str, type[Any]] = {
    c.__name__: c for c in (IntGrid, FloatGrid, LevelGrid, MiniFloatGrid, GaussianGrid, CodebookGrid, DynamicGrid)
}


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """`{"type": name, **fields}`.

    Raises:
        ConfigError: a type that nobody could read again.
    """
    if type(grid) not in GRIDS.values():
        raise ConfigError(f"{type(grid).__name__} is no grid that a saved model can name; known: {sorted(GRIDS)}")
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
