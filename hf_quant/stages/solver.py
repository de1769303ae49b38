"""Solver: which codes?"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_quant.grids import CodebookGrid
from hf_quant.qtensor import QTensor, nearest, row_slices
from hf_quant.spec import Spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import Range


class Solver(Protocol):
    """Chooses the codes of one weight matrix."""

    def refuses(self, spec: Spec) -> str | None:
        """None when it can solve for this spec, else the reason (asked at plan time)."""

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """`quadratic` is None exactly when the recipe has no objective; `W_NK` is then of any floating type."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Round to nearest: the baseline of everything, and the solver when data says nothing."""

    def refuses(self, spec: Spec) -> str | None:
        """Takes every grid whose values are known beforehand."""
        return "codebooks are fitted to the weights, not rounded to" if isinstance(spec.grid, CodebookGrid) else None

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """Fit the ranges (weighed by diag H when known), then round."""
        importance = None if quadratic is None else quadratic.H_KK.diagonal()
        slices = row_slices(W_NK.shape) if spec.block[0] == 1 else [slice(None)]
        parts = [nearest(W_NK[rows], *fit.fit(W_NK[rows], spec, importance), spec) for rows in slices]
        zeros = [part.zero for part in parts if part.zero is not None]
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        return QTensor(codes, scale, torch.cat(zeros) if zeros else None, spec, (W_NK.shape[0], W_NK.shape[1]))
