"""Hadamard: an orthogonal transform of rows, described by two numbers, and the matrices it is made of.

One description for weights stored rotated (`Spec.rotation`) and for inputs rotated while the model runs
(`QuantLinear.rotation`). A size n = 2^k m is transformed as `H_{2^k} (x) K_m`, with Sylvester's H and a matrix K of
Paley's, whose orders are `p + 1` (p a prime, 3 mod 4) and `2 (p + 1)` (p a prime, 1 mod 4): 12, 20, 28, 36, 44 ... 244.
"""

from dataclasses import asdict, dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import ConfigError

WORD = (1 << 64) - 1
LARGEST = 256  # of Paley's factor, which is multiplied densely: a larger one is no fast transform


@dataclass(frozen=True, slots=True)
class Hadamard:
    """`x -> (x signs) (I (x) H_g) / sqrt(g)`: orthogonal, so `W -> W R` and `x -> x R` leave `x W^T` as it is.

    Attributes:
        size: an order of `core`. Blocks are of g = size columns where it divides the width, else of their greatest
            common divisor: a power of two fits every width.
        seed: of the signs (see `signs`); None: no signs.
    """

    size: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1 or core(self.size) is None:
            raise ConfigError(f"size={self.size!r}: no Hadamard matrix of this order is known here")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 62):
            raise ConfigError(f"seed={self.seed!r}: None, or an integer from 0 to 2^62 - 1")

    @classmethod
    def of_width(cls, width: int, seed: int | None = None) -> "Hadamard":
        """The widest blocks that divide `width`: as a rule the whole of it."""
        return cls(max(n for n in range(1, width + 1) if width % n == 0 and core(n) is not None), seed)

    def refuses(self, width: int) -> str | None:
        """None when rows of this width can be transformed, else the reason why not."""
        block = gcd(self.size, width)
        return (
            None if core(block) else f"no Hadamard matrix of order {block} ({self.size}, in rows of {width}) is known"
        )

    def apply(self, x: Tensor) -> Tensor:
        """`x R` along the last axis, in x's type, computed in at least float32. THE definition of stored weights.

        Sums have one order (but for Paley's factor), so the bits of a row depend on it alone. `hf_quant::hadamard`
        computes the same up to rounding, faster.
        """
        return self._transform(x, inverse=False)

    def inverse(self, v: Tensor) -> Tensor:
        """`v R^T`, which undoes `apply` up to rounding."""
        return self._transform(v, inverse=True)

    def _transform(self, x: Tensor, *, inverse: bool) -> Tensor:
        width, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        size, y = gcd(self.size, width), x.to(dtype)
        flip = None if self.seed is None else signs(width, self.seed).to(y)
        if flip is not None and not inverse:
            y = y * flip
        half = m = core(size) or 1
        if m > 1:
            K = paley(m).to(y)
            y = (y.reshape(-1, m) @ (K.T if inverse else K)).reshape(x.shape)
        y = y.reshape(-1, size)
        while half < size:  # the fast Walsh-Hadamard transform
            a, b = y.view(-1, size // (2 * half), 2, half).unbind(2)
            y, half = torch.stack((a + b, a - b), 2).view(-1, size), 2 * half
        y = (y * size**-0.5).view(x.shape)
        done: Tensor = (y * flip if flip is not None and inverse else y).to(x.dtype)
        return done

    def matrix(self, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole orthogonal matrix R, `[width, width]`: `x R` is what the transform makes of x."""
        size = gcd(self.size, width)
        m = core(size) or 1
        block = torch.kron(sylvester(size // m).double(), paley(m).double()) / size**0.5
        whole: Tensor = torch.block_diag(*[block] * (width // size))
        return (whole if self.seed is None else signs(width, self.seed)[:, None] * whole).to(dtype)

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Hadamard":
        """Inverse of `to_json`; an unknown field is a `ConfigError`."""
        if not isinstance(data, dict) or set(data) != {"size", "seed"}:
            raise ConfigError(f"a rotation has exactly the fields size and seed, got {data!r}")
        return cls(**data)


@cache
def core(order: int) -> int | None:
    """The smallest m with `order = 2^k m` for which Paley's construction (or m = 1) is known; None: there is none."""
    odd = order & -order
    odd = order // odd
    if odd == 1:
        return 1
    m = 4 * odd
    while order % m == 0 and m <= LARGEST:
        if any(_prime(p) and p % 4 == remainder for p, remainder in ((m - 1, 3), (m // 2 - 1, 1))):
            return m
        m *= 2
    return None


def _prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


@cache
def paley(m: int) -> Tensor:
    """A Hadamard matrix of order m, entries +-1 (float32): `K K^T = m I`."""
    if m == 1:
        return torch.ones(1, 1)
    first = _prime(m - 1) and (m - 1) % 4 == 3
    p = m - 1 if first else m // 2 - 1
    squares = torch.zeros(p)
    squares[torch.arange(1, p).square() % p] = 1
    chi = 2 * squares - 1
    chi[0] = 0
    i = torch.arange(p)
    S = torch.zeros(p + 1, p + 1)
    S[0, 1:], S[1:, 0] = 1, -1 if first else 1
    S[1:, 1:] = chi[(i[:, None] - i) % p]
    if first:
        return torch.eye(m) + S
    return torch.kron(S, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(
        torch.eye(p + 1), torch.tensor([[1.0, -1], [-1, -1]])
    )


@cache
def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of order n = 2^k, entries +-1 (float32): symmetric."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), H)
    return H


@cache
def signs(width: int, seed: int) -> Tensor:
    """`width` signs +-1 (float64): the top bit of SplitMix64 begun at `seed`. Part of saved models: never change it."""

    def mixed(i: int) -> int:
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return (z ^ (z >> 31)) >> 63

    with torch.device("cpu"):  # models are built inside torch.device("meta")
        return torch.tensor([1 - 2 * mixed(i) for i in range(width)], dtype=torch.float64)
