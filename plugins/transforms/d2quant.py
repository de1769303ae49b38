"""D2Quant: a second scale a column that costs nothing, and the mean deviation corrected (after arXiv:2602.02546).

    W ~ (step q) diag(c):   c_j = <W_:j, (step q)_:j> / || (step q)_:j ||^2,   q and step those of W / c,   in turns
    c goes into the rows of the layer before (x_j <- x_j c_j), so nothing of it is stored
    y <- y + W E[x~ - x]    the mean drift of a layer's input from full precision, taken out of its output

Then GPTQ with c fixed.

Shapes: W_NK of the reader; c_K with geometric mean 1; x~_TK, x_TK inputs in full precision and as they are.
Differs from the paper: built from its description, there is no public code; every legal pair of layers has column
scales (values and their reader too), not the down projection alone; the drift is corrected at the input of every
layer, as a constant of its output, not at the norm after attention only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import QTensor, nearest
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import Constant
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.range import Range
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import Drift, Gram, Stat, Stats, hessian


@dataclass(frozen=True, slots=True)
class DualScale:
    """Alternate between column scales and rounding, `rounds` times; folded while the error falls by `gain`."""

    rounds: int = 6
    gain: float = 0.01
    needs: ClassVar[tuple[Stat, ...]] = (Gram(),)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds!r}: at least 1")

    def pair(
        self, producer_KJ: Tensor, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `PairTransform.pair`: `x_j <- x_j c_j`, that is `s = 1 / c`."""
        importance_K = hessian(stats).diagonal()
        c_K, errors = alternate(torch.cat(list(Ws)).float(), weights, fit, importance_K, self.rounds)
        return Diagonal(1 / c_K) if errors[-1] < (1 - self.gain) * errors[0] else None


def alternate(
    W_NK: Tensor, spec: Spec, fit: Range, importance_K: Tensor | None, rounds: int
) -> tuple[Tensor, list[float]]:
    """(c_K, the error `sum_j h_j ||W_:j - c_j (step q)_:j||^2` of every round, which never rises)."""
    h_K = torch.ones(W_NK.shape[1]) if importance_K is None else importance_K
    c_K, errors = torch.ones_like(h_K), list[float]()

    def rounded(c_K: Tensor) -> Tensor:
        part = W_NK / c_K
        return nearest(part, *fit.fit(part, spec, h_K * c_K.square()), spec).dequantize()

    def error(c_K: Tensor, Q: Tensor) -> float:
        return float(((W_NK - Q * c_K).square().sum(0) * h_K).sum())

    Q = rounded(c_K)
    errors.append(error(c_K, Q))
    for _ in range(rounds):
        dot, square = (W_NK * Q).sum(0), Q.square().sum(0)
        wanted = torch.where((dot > 0) & (square > 0), dot / square.clamp_min(1e-30), c_K).clamp(0.1, 10)
        wanted = wanted / wanted.log().mean().exp()
        tried = rounded(wanted)
        if error(wanted, tried) >= errors[-1]:
            break
        c_K, Q = wanted, tried
        errors.append(error(c_K, Q))
    return c_K, errors


@dataclass(frozen=True, slots=True)
class DeviationCorrection:
    """Take the mean drift of the input out of the output."""

    needs: ClassVar[tuple[Stat, ...]] = (Drift(),)

    def repair(self, W_NK: Tensor, q: QTensor, stats: Stats) -> tuple[Constant, ...]:
        """`Q E[x~ - x]`; nothing without statistics."""
        return (Constant(q.dequantize() @ Drift().value(stats[Drift()])),) if Drift() in stats else ()


@method(
    "d2quant",
    paper=Paper("2602.02546", "D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs"),
    domains={"llm"},
    claim="at 2 bits in groups of 64, KL below gptq's, with column scales alone and more so with both parts",
)
def d2quant(
    bits: int = 2, group_size: int = 64, symmetric: bool = False, rounds: int = 6, correct: bool = True
) -> Recipe:
    """GPTQ after column scales (`rounds`), with deviations corrected."""
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        range=MseClip(steps=24, floor=0.5, power=2.0),
        transforms=(DualScale(rounds),),
        objective=LayerMse(),
        solver=Gptq(),
        repairs=(DeviationCorrection(),) if correct else (),
    )
