"""Rotation: a random orthogonal transform of a weight's rows that its values are stored behind.

Rotated, weights are nearly Gaussian whatever they were, so one grid fits all. It is described by two numbers: signs
come from the seed, the rest is Hadamard's matrix.
"""

from dataclasses import asdict, dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import ConfigError

WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Rotation:
    """`v = (x signs) H / sqrt(g)` in blocks of g columns: orthogonal, so `(v_W) (v_x)^T = W x^T`.

    Attributes:
        size: a power of two; g is the largest power of two that divides both it and the width, so any width will do.
        seed: of the signs (see `signs`).
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1 or self.size & (self.size - 1):
            raise ConfigError(f"size={self.size!r}: a rotation has blocks of a power of two")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 62:
            raise ConfigError(f"seed={self.seed!r}: an integer from 0 to 2^62 - 1")

    def apply(self, x: Tensor) -> Tensor:
        """`[..., K]` -> its rotated coordinates, float32."""
        return self._mix(x.float() * _signs(x.shape[-1], self.seed).to(x.device))

    def inverse(self, v: Tensor) -> Tensor:
        """Inverse of `apply`, up to rounding."""
        return self._mix(v.float()) * _signs(v.shape[-1], self.seed).to(v.device)

    def _mix(self, x: Tensor) -> Tensor:
        """The fast Walsh-Hadamard transform of each block. Sums have one order, so a row's bits depend on it alone."""
        size = gcd(self.size, x.shape[-1])
        y, half = x.reshape(-1, size), 1
        while half < size:
            a, b = y.view(-1, size // (2 * half), 2, half).unbind(2)
            y, half = torch.stack((a + b, a - b), 2).view(-1, size), 2 * half
        mixed: Tensor = (y * size**-0.5).view(x.shape)
        return mixed

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Rotation":
        """Inverse of `to_json`; an unknown field is a `ConfigError`."""
        if not isinstance(data, dict) or set(data) != {"size", "seed"}:
            raise ConfigError(f"a rotation has exactly the fields size and seed, got {data!r}")
        return cls(**data)


@cache
def _signs(width: int, seed: int) -> Tensor:
    """`width` signs +-1 (float32): the top bit of SplitMix64 begun at `seed`. Part of saved models: never change it."""

    def top_bit(i: int) -> int:
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return (z ^ (z >> 31)) >> 63

    with torch.device("cpu"):  # models are built inside torch.device("meta")
        return torch.tensor([1.0 - 2.0 * top_bit(i) for i in range(width)])
