"""DFQ: 8 bits for a whole tensor without data: neighbours equalized, biases corrected (arXiv:1906.04721).

    s_k = r1_k / sqrt(r1_k r2_k)     r1_k, r2_k: largest |weight| of the producer's row k and of the readers' column k
    W1_k: <- W1_k: / s_k,  b1_k <- b1_k / s_k,  W2_:k <- W2_:k s_k        until max |s - 1| < 1e-4
    b <- b - (Q - W) E[x]

Shapes: s_K; W1_KJ, W2_NK weights of a legal pair; E[x] `[K]`.
Differs from the paper: pairs are those that a block's behaviour allows (values and their reader, the two halves of a
gated MLP, layers around a ReLU, a batch norm and the layer after it), not those of convolutional networks; E[x] is the
mean over inputs, made up where none are given, not the analytic one of batch norm's statistics; no bias is absorbed;
ReLU6 is not replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.method import Paper, method
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import Constant
from hf_quant.spec import Spec, act_spec, int_spec
from hf_quant.stages.range import Range
from hf_quant.stages.sampler import MadeUp
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import Mean, Stat, Stats


@dataclass(frozen=True, slots=True)
class Equalize:
    """Give row k of the producer and column k of the readers the same range."""

    tolerance: float = 1e-4
    needs: ClassVar[tuple[Stat, ...]] = ()

    def pair(
        self, producer_KJ: Tensor, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `PairTransform.pair`."""
        r1_K = producer_KJ.abs().amax(1).double()
        r2_K = torch.stack([W.abs().amax(0) for W in Ws]).amax(0).double()
        s_K = torch.where((r1_K > 0) & (r2_K > 0), (r1_K / r2_K).sqrt(), torch.ones_like(r1_K))
        return Diagonal(s_K) if bool((s_K - 1).abs().max() > self.tolerance) else None


@dataclass(frozen=True, slots=True)
class BiasCorrection:
    """Take the mean of the error that rounding the weights makes out of the output."""

    needs: ClassVar[tuple[Stat, ...]] = (Mean(),)

    def repair(self, W_NK: Tensor, q: QTensor, stats: Stats) -> tuple[Constant, ...]:
        """`-(Q - W) E[x]`; nothing without statistics."""
        if Mean() not in stats:
            return ()
        return (Constant((W_NK - q.dequantize()) @ Mean().value(stats[Mean()])),)


@method(
    "dfq",
    paper=Paper("1906.04721", "Data-Free Quantization Through Weight Equalization and Bias Correction"),
    domains={"llm", "vit"},
    claim="8 bits, one scale a tensor: KL below a fifth of that without equalization when channels differ",
)
def dfq(
    bits: int = 8, act_bits: int | None = None, equalize: bool = True, correct: bool = True, samples: int = 16
) -> Recipe:
    """Equalize, round with one scale a tensor, correct biases; `act_bits`: inputs a tensor, static, too."""
    return Recipe(
        weights=Spec(grid=int_spec(bits).grid, block=(-1, -1), zero="int"),
        inputs=None if act_bits is None else act_spec(act_bits, static=True, symmetric=False),
        sampler=MadeUp(samples=samples),
        transforms=(Equalize(),) if equalize else (),
        repairs=(BiasCorrection(),) if correct else (),
    )
