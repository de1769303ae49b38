"""Clipping search: shrink every group's range until its rounding error is least (after arXiv:2210.17323's code).

    (scale, zero) = argmin over r of  sum_k c_k |w_k - Q(w_k; r low, r high)|^p,   r = 1 ... floor in equal steps

with p = 2.4 and c = 1, or c = the importance of each input channel when the solver knows one (the diagonal of H).

Shapes: W_NK weight; scale and zero `[N, K / group_size]`; a candidate is fitted to all blocks at once.
Differs from the paper: a preset of its own, data-free; the search is an option of the GPTQ authors' code, where it
precedes their solver; 100 ratios down to 0.2 instead of 80 down to 0.21.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.qtensor import as_blocks, from_extremes
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec

CHUNK = 1 << 16  # values searched at a time: they stay in the cache while all ratios are tried


@dataclass(frozen=True, slots=True)
class MseClip:
    """Search `steps` shrink ratios between 1 and `floor` for the least `sum |error|^power`."""

    steps: int = 100
    floor: float = 0.2
    power: float = 2.4

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.floor <= 1 or self.power <= 0:
            raise ConfigError(f"{self}: steps must be positive, floor in (0, 1], power above 0")

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        blocks = as_blocks(W_NK, spec)
        nb, kb, size = blocks.shape
        weights = None
        if importance_K is not None:
            weights = as_blocks(importance_K.expand(W_NK.shape), spec).reshape(-1, size)
        rows = max(1, CHUNK // size)
        parts = [
            self._search(w, None if weights is None else weights[i : i + rows], spec)
            for i, w in zip(range(0, nb * kb, rows), blocks.reshape(-1, size).split(rows), strict=True)
        ]
        scale = torch.cat([s for s, _ in parts]).reshape(nb, kb)
        zeros = [z for _, z in parts if z is not None]
        return scale, torch.cat(zeros).reshape(nb, kb) if zeros else None

    def _search(self, w: Tensor, weights: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor | None]:
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        least = w.new_full(low.shape, torch.inf)
        scale, zero = from_extremes(low, high, spec)
        for ratio in torch.linspace(1, self.floor, self.steps).tolist():
            s, z = from_extremes(low * ratio, high * ratio, spec)
            steps = w / s if z is None else w / s + z
            values = spec.grid.decode(spec.grid.encode(steps))
            total = self._loss(w, w - (values if z is None else values - z) * s, weights)
            better = total < least
            least, scale = torch.where(better, total, least), torch.where(better, s, scale)
            if zero is not None and z is not None:
                zero = torch.where(better, z, zero)
        return scale, zero

    def _loss(self, w: Tensor, error: Tensor, weights: Tensor | None) -> Tensor:
        """What a candidate costs `[blocks, 1]`; all arguments `[blocks, size]`, `error` is overwritten."""
        single = error.abs_().pow_(self.power)
        return (single if weights is None else single.mul_(weights)).sum(1, keepdim=True)


@method(
    "mse-clip",
    paper=Paper("2210.17323", "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"),
    domains={"llm", "vit", "vlm", "moe", "mamba", "diffusion"},
    claim="weight error below rtn's in every group, and KL below rtn's at 3 bits in groups of 64",
)
def mse_clip(
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    steps: int = 100,
    floor: float = 0.2,
    power: float = 2.4,
) -> Recipe:
    """Round to nearest in searched ranges."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=steps, floor=floor, power=power),
    )
