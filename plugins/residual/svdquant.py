"""SVDQuant: outliers go into the weight by smoothing, and out of it into a low-rank branch (arXiv:2411.05007).

    x <- x / s,  W <- W s          s_k = max|x_k|^a / max|W_:k|^(1 - a),  a the best of a grid
    W = up down + R;               y = Q(x) Q(R)^T + (x down^T) up^T
    up down = SVD_r(W - Q(W - up down)),  begun with SVD_r(W), again and again; the best round counts

Every error is that of the output with weights and inputs rounded, on rows of real inputs.

Shapes: x_TK, W_NK; down_RK, shared by the layers of a group; up_NR; scales a group of columns, of weights and inputs.
Differs from the paper: where the scales cannot be folded into what comes before (a norm modulated by the timestep), the
layer divides its input itself; the branch is in the model's own type, its values those of bfloat16; inputs are signed;
no weight is skipped by its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.residual.lowrank_core import low_rank
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.qtensor import nearest
from hf_quant.recipe import Recipe
from hf_quant.runtime.activation import fake_quantize
from hf_quant.runtime.branches import Branch, LowRank
from hf_quant.spec import Spec, act_spec, check_group_size, int_spec
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import AbsMax, Rows, Stat, Stats

ROWS = Rows(256)


@dataclass(frozen=True, slots=True)
class SearchedSmoothing:
    """The exponent, 0 ... 1 in `steps` steps, with the least output error; none at all is a candidate."""

    steps: int = 20
    needs: ClassVar[tuple[Stat, ...]] = (AbsMax(), ROWS)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: at least 1")

    def online(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """See `OnlineTransform.online`."""
        W_NK, x_TK, x_K = torch.cat(list(Ws)).float(), ROWS.values(stats[ROWS]), stats[AbsMax()]["max"].float()
        w_K = W_NK.abs().amax(0)
        seen_K = (x_K > 0) & (w_K > 0)
        best, least = None, output_error(W_NK, None, x_TK, weights, inputs, fit)[0]
        for step in range(self.steps + 1):
            a = step / self.steps
            s_K = torch.where(seen_K, x_K.pow(a) / w_K.pow(1 - a), torch.ones_like(x_K))
            error, _ = output_error(W_NK * s_K, None, x_TK / s_K, weights, inputs, fit)
            if error < least:
                best, least = s_K, error
        return None if best is None else Diagonal(best)


def output_error(
    W_NK: Tensor, low: LowRank | None, x_TK: Tensor, weights: Spec, inputs: Spec | None, fit: Range
) -> tuple[float, Tensor]:
    """`||x R^T - Q(x) Q(R)^T||^2` with `R = W - up down`, and `Q(R)`."""
    R_NK = W_NK if low is None else W_NK - low.matrix()
    Q_NK = nearest(R_NK, *fit.fit(R_NK, weights), weights).dequantize()
    rounded = x_TK if inputs is None or inputs.stored else fake_quantize(x_TK, inputs, {})
    return float((x_TK @ R_NK.T - rounded @ Q_NK.T).square().sum()), Q_NK


@dataclass(frozen=True, slots=True)
class LowRankSplit:
    """A branch of `rank`, at most `rounds` times made anew of what rounding the rest left over."""

    rank: int = 32
    rounds: int = 100
    needs: ClassVar[tuple[Stat, ...]] = (ROWS,)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1 or self.rounds < 1:
            raise ConfigError(f"rank={self.rank!r}, rounds={self.rounds!r}: positive integers")

    def split(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> list[tuple[Tensor, tuple[Branch, ...]]]:
        """See `Splitter.split`; the layers of a group have one down factor. Stops when a round is no better."""
        W_NK, x_TK = torch.cat(list(Ws)).float(), ROWS.values(stats[ROWS])
        best, least, wanted = None, torch.inf, W_NK
        for _ in range(self.rounds):
            down, up = (t.bfloat16().float() for t in low_rank(wanted, self.rank))
            low = LowRank(down, up)
            error, Q_NK = output_error(W_NK, low, x_TK, weights, inputs, fit)
            if best is not None and error >= least:
                break
            best, least, wanted = low, error, W_NK - Q_NK
        assert best is not None  # noqa: S101  there is at least one round
        ups = best.up_NR.split([len(W) for W in Ws])
        parts = [LowRank(best.down_RK, up.contiguous()) for up in ups]
        return [(W.float() - part.matrix(), (part,)) for W, part in zip(Ws, parts, strict=True)]


@method(
    "svdquant",
    paper=Paper("2411.05007", "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"),
    domains={"diffusion", "llm", "vit"},
    claim="with 4-bit weights and inputs KL below smoothing alone, that below rtn's; a branch is worth its bytes",
)
def svdquant(
    bits: int = 4,
    act_bits: int = 4,
    group_size: int = 64,
    act_group_size: int = 64,
    rank: int = 32,
    steps: int = 20,
    rounds: int = 100,
    solver: str = "rtn",
) -> Recipe:
    """Smooth (`steps=0`: not), split (`rank=0`: not), round the rest by `solver`, "rtn" or "gptq"."""
    if solver not in ("gptq", "rtn"):
        raise ConfigError(f'solver={solver!r}: "gptq" or "rtn"')
    check_group_size(act_group_size)
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=True),
        inputs=replace(act_spec(act_bits), block=(1, act_group_size)),
        transforms=(SearchedSmoothing(steps),) if steps else (),
        splitter=LowRankSplit(rank, rounds) if rank else None,
        objective=LayerMse() if solver == "gptq" else None,
        solver=Gptq() if solver == "gptq" else Nearest(),
    )
