"""AWQ: activation-aware weight quantization (arXiv:2306.00978).

Input channels with large activations get a finer step: their columns are scaled up before rounding. Then the range
of every group is clipped.

    s_k = mean|x_k|^alpha,  alpha = argmin over 0, 1/20 ... 1 of  sum_i || (W_i - Q(W_i s) / s) X ||^2
    r   = argmin over 1 ... 0.5 of  || (w_g - Q(w_g; r low, r high)) X_g ||^2      for every group g of every row

Errors are exact: `tr(E H E^T)` with the Gram matrix H of the inputs, for the clipping its diagonal blocks H_gg.

Shapes: x_TK inputs of a group of layers; s_K; W_NK of each layer of the group; H_KK.
Differs from the paper: the loss of the scales is that of the layers themselves, where the paper takes the output of
the whole attention or MLP block, and no samples are run again; queries and keys are clipped like the others; a layer
whose producer cannot take a scale is clipped only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import IntGrid
from hf_quant.method import Paper, method
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse, Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import Gram, Moments, Stat, Stats, hessian


@dataclass(frozen=True, slots=True)
class ActivationAware:
    """Search the exponent of the mean activation magnitude, `alpha` = 0 ... 1 in `steps` steps."""

    steps: int = 20
    needs: ClassVar[tuple[Stat, ...]] = (Gram(), Moments())

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: at least 1")

    def propose(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `Transform.propose`."""
        moments = stats[Moments()]
        mean_K = (moments["abs"] / moments["count"].clamp_min(1)).float()
        H_KK = hessian(stats)
        mean_K = torch.where(mean_K > 0, mean_K, mean_K.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        unit_K = mean_K / mean_K.log().mean().exp()  # geometric mean 1, so that every power has it too
        candidates = [unit_K.pow(step / self.steps) for step in range(self.steps + 1)]
        losses = [self.loss(Ws, s_K, H_KK, weights, fit) for s_K in candidates]
        best = min(range(len(losses)), key=losses.__getitem__)
        return Diagonal(candidates[best]) if best else None

    @staticmethod
    def loss(Ws: Sequence[Tensor], s_K: Tensor, H_KK: Tensor, spec: Spec, fit: Range) -> float:
        """`sum_i tr(E_i H E_i^T)` of rounding the weights scaled by `s_K`."""
        total = 0.0
        for W in Ws:
            scaled = W.float() * s_K
            scale, zero = fit.fit(scaled, spec)
            E = W - nearest(scaled, scale, zero, spec).dequantize() / s_K
            total += float(((E @ H_KK) * E).sum())
        return total


@dataclass(frozen=True, slots=True)
class ClippedNearest:
    """Round to nearest in the range, shrunken by `steps` ratios from 1 down to `floor`, with the least output error.

    The error of a block counts for itself: `e H_gg e^T` with the diagonal block of H.
    """

    steps: int = 20
    floor: float = 0.5

    def refuses(self, spec: Spec) -> str | None:
        """Takes integer grids whose blocks are one row high."""
        if not isinstance(spec.grid, IntGrid):
            return "clipping searches the range of integer grids only"
        return None if spec.block[0] == 1 else "clipping is searched for every row: a block must be one row high"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """See `Solver.solve`; ratio 1 is the range from min to max."""
        if quadratic is None:
            return Nearest().solve(W_NK, spec, fit, None)
        blocks = as_blocks(W_NK, spec)
        G, size = blocks.shape[1:]
        H_GKK = diagonal_blocks(quadratic.H_KK, G, size)
        low, high = blocks.amin(-1), blocks.amax(-1)
        scale, zero = from_extremes(low, high, spec)
        least = torch.full_like(low, torch.inf)
        for ratio in torch.linspace(1, self.floor, self.steps).tolist():
            s, z = from_extremes(low * ratio, high * ratio, spec)
            E_GNK = as_blocks(W_NK - nearest(W_NK, s, z, spec).dequantize(), spec).transpose(0, 1)
            error = (E_GNK @ H_GKK).mul_(E_GNK).sum(-1).T
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, s, scale)
            if zero is not None and z is not None:
                zero = torch.where(better, z, zero)
        return nearest(W_NK, scale, zero, spec)


def diagonal_blocks(H_KK: Tensor, G: int, size: int) -> Tensor:
    """`[K, K] -> [G, size, size]`, zero-padded where the last block is ragged."""
    pad = G * size - len(H_KK)
    return F.pad(H_KK, (0, pad, 0, pad)).view(G, size, G, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


@method(
    "awq",
    paper=Paper("2306.00978", "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"),
    domains={"llm", "vit", "vlm", "moe"},
    claim="KL below rtn's at 3 bits in groups of 64",
)
def awq(bits: int = 4, group_size: int = 128, symmetric: bool = False, steps: int = 20, clip_steps: int = 20) -> Recipe:
    """Scale by the searched power, then round in searched ranges (`clip_steps=1`: from min to max)."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        transforms=(ActivationAware(steps),),
        objective=LayerMse(),
        solver=ClippedNearest(steps=clip_steps),
    )
