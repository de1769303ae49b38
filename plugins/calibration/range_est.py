"""Range estimation: search each group's range where the error is locally convex (arXiv:2510.04044).

    (a, b) = argmin  sum_k c_k (w_k - Q(w_k; a low, b high))^2,   a and b in [floor, 1]

A coarse grid brackets the minimum of a = b, golden section narrows it; with a zero point a and b then move in turn.

Shapes: W_NK weight; scale and zero `[N, K / group_size]`; all groups are searched at once.
Differs from the paper: the error is weighed by the importance of each input where a solver knows one; the best point
ever seen is kept, since rounding makes the error jagged. The transformed space `sign(w) |w|^power` is a grid here: its
levels are the powers `1 / power` of equal steps; whether it is better is for the user to see, not chosen by tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import LevelGrid
from hf_quant.method import Paper, method
from hf_quant.qtensor import as_blocks, from_extremes
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec

CHUNK = 1 << 16  # values searched at a time: they stay in the cache
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class GoldenRange:
    """Bracket with `points` ratios from 1 to `floor`, then golden section down to `tolerance`; twice around."""

    points: int = 9
    floor: float = 0.3
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.points < 3 or not 0 < self.floor < 1 or not 0 < self.tolerance < 1:
            raise ConfigError(f"{self}: at least 3 points, floor and tolerance between 0 and 1")

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        blocks = as_blocks(W_NK, spec)
        nb, kb, size = blocks.shape
        weights = torch.ones_like(W_NK) if importance_K is None else importance_K.expand(W_NK.shape)
        parts = [
            self._search(w, c, spec)
            for w, c in zip(
                blocks.reshape(-1, size).split(max(1, CHUNK // size)),
                as_blocks(weights, spec).reshape(-1, size).split(max(1, CHUNK // size)),
                strict=True,
            )
        ]
        scale = torch.cat([s for s, _ in parts]).reshape(nb, kb)
        zeros = [z for _, z in parts if z is not None]
        return scale, torch.cat(zeros).reshape(nb, kb) if zeros else None

    def _search(self, w: Tensor, c: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)

        def error(a: Tensor, b: Tensor) -> Tensor:
            s, z = from_extremes(low * a, high * b, spec)
            values = spec.grid.decode(spec.grid.encode(w / s if z is None else w / s + z))
            return ((w - (values if z is None else values - z) * s).square() * c).sum(1, keepdim=True)

        a = b = self._minimum(lambda r: error(r, r), torch.ones_like(low))
        if spec.zero != "none":
            for _ in range(2):
                a = self._minimum(lambda r, b=b: error(r, b), a)  # type: ignore[misc]
                b = self._minimum(lambda r, a=a: error(a, r), b)  # type: ignore[misc]
        return from_extremes(low * a, high * b, spec)

    def _minimum(self, error: Callable[[Tensor], Tensor], best: Tensor) -> Tensor:
        """The best ratio seen for each group, no worse than the one given."""
        least = error(best)

        def see(ratio: Tensor) -> Tensor:
            nonlocal best, least
            found = error(ratio)
            best, least = torch.where(found < least, ratio, best), torch.minimum(found, least)
            return found

        step = (1 - self.floor) / (self.points - 1)
        coarse = torch.stack([see(torch.full_like(best, 1 - i * step)) for i in range(self.points)])
        middle = 1 - coarse.argmin(0) * step
        left, right = (middle - step).clamp_min(self.floor), (middle + step).clamp_max(1)
        inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        at_inner, at_outer = see(inner), see(outer)
        for _ in range(math.ceil(math.log(self.tolerance / (2 * step), GOLDEN))):
            lower = at_inner < at_outer  # the minimum is left of `outer`
            left, right = torch.where(lower, left, inner), torch.where(lower, outer, right)
            new = torch.where(lower, right - GOLDEN * (right - left), left + GOLDEN * (right - left))
            found = see(new)
            inner, outer = torch.where(lower, new, outer), torch.where(lower, inner, new)
            at_inner, at_outer = torch.where(lower, found, at_outer), torch.where(lower, at_inner, found)
        return best


@method(
    "range-est",
    paper=Paper("2510.04044", "Quantization Range Estimation for Convolutional Neural Networks"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="weight error no higher than min-max's or a 100-point search's; KL below rtn's at 4 bits, a row a scale",
)
def range_est(
    bits: int = 4, group_size: int = -1, symmetric: bool = False, points: int = 9, power: float = 1.0
) -> Recipe:
    """Round to nearest in estimated ranges; `power` below 1: levels closer together near zero (symmetric)."""
    spec = int_spec(bits, group_size, symmetric=symmetric)
    if not 0 < power <= 1:
        raise ConfigError(f"power={power!r}: above 0, at most 1 (equal steps)")
    if power < 1:
        top = 2 ** (bits - 1)
        steps = [(i + 0.5) / (top - 0.5) for i in range(-top, top)]
        levels = tuple(math.copysign(abs(x) ** (1 / power), x) for x in steps)
        spec = replace(spec, grid=LevelGrid(levels), zero="none")
    return Recipe(weights=spec, range=GoldenRange(points=points))
