"""What a linear layer holds beside its codes, and the logical weight that they make together."""

import torch
from torch import Tensor, nn

from hf_quant.formats import Layer
from hf_quant.hadamard import Hadamard
from hf_quant.runtime.branches import Sparse, check_sparse
from hf_quant.runtime.packed import Packed, local

SPARSE = ("sparse_starts", "sparse_columns", "sparse_values")


class WithTerms(Packed):
    """The logical weight is `(Q + up down + S) R^T diag(s)`; `QuantLinear` has the names and the shapes.

    Every term is a Parameter or None, so a layer without any costs what its codes cost.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter  # or None, as in nn.Linear
    rotation: Hadamard | None
    pre_scale: nn.Parameter | None
    shift: nn.Parameter | None
    offset: nn.Parameter | None
    lr_down: nn.Parameter | None
    lr_up: nn.Parameter | None
    sparse_starts: nn.Parameter | None
    sparse_columns: nn.Parameter | None
    sparse_values: nn.Parameter | None
    factors: dict[str, Layer]  # of a coded low-rank branch, by the start of their parameters' names

    @property
    def sparse(self) -> Sparse | None:
        """The sparse term, if there is one."""
        if self.sparse_starts is None or self.sparse_columns is None or self.sparse_values is None:
            return None
        return Sparse(self.sparse_starts, self.sparse_columns, self.sparse_values, self.in_features)

    @property
    def rank(self) -> int:
        """Of the low-rank branch; 0 without one."""
        if self.factors:
            return self.factors["lr_down"].shape[0]
        return 0 if self.lr_down is None else self.lr_down.shape[0]

    def low_rank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """`(down_RK, up_NR)` in `dtype`, if there is a low-rank branch."""
        if self.factors:
            down, up = (self._factor(name, dtype) for name in ("lr_down", "lr_up"))
            return down, up
        if self.lr_down is None or self.lr_up is None:
            return None
        return self.lr_down.to(dtype), self.lr_up.to(dtype)

    def _factor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensors = [getattr(self, f"{name}_qweight"), getattr(self, f"{name}_scale")]
        factor: Tensor = torch.ops.hf_quant.int_group_1_weight(tensors, self.factors[name].key, dtype)
        return factor

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logical weight `(Q + up down + S) R^T diag(s)`, computed in float32."""
        if not self.rank and all(extra is None for extra in (self.sparse, self.pre_scale, self.rotation)):
            return super().dequantize(dtype)
        W_NK = super().dequantize(torch.float32)
        if (low := self.low_rank(torch.float32)) is not None:
            W_NK = W_NK + low[1] @ low[0]
        if self.sparse is not None:
            W_NK = W_NK + self.sparse.matrix()
        W_NK = self._rotate(W_NK, inverse=True)
        if self.pre_scale is not None:
            W_NK = W_NK * self.pre_scale.float()
        return W_NK.to(dtype or self.compute_dtype)

    def _without_extras(self, W_NK: Tensor) -> Tensor:
        if self.pre_scale is not None:
            W_NK = W_NK.float() / self.pre_scale.float()
        W_NK = self._rotate(W_NK)
        if (low := self.low_rank(torch.float32)) is not None:
            W_NK = W_NK.float() - low[1] @ low[0]
        if self.sparse is not None:
            W_NK = W_NK.float() - self.sparse.matrix()
        return W_NK

    def _rotate(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """`x R` (or `x R^T`), in x's type."""
        if self.rotation is None:
            return x
        rotated: Tensor = torch.ops.hf_quant.hadamard(x, self.rotation.size, self.rotation.seed, inverse)
        return rotated

    def plain_bias(self) -> Tensor | None:
        """The bias of a dense layer with the logical weight: `b + o + Q t`, float32; None when there is nothing."""
        total = torch.zeros(self.out_features, device=local(self.qweight).device)
        if self.shift is not None:
            total = total + Packed.dequantize(self, torch.float32) @ self.shift.float()
        for part in (self.offset, self.bias):
            total = total if part is None else total + part.float()
        return None if self.bias is None and self.offset is None else total

    @torch.no_grad()
    def requantize_(self, W_NK: Tensor) -> None:
        """See `Packed.requantize_`; what the shift does is taken out of the new codes' output as well."""
        before = None if self.shift is None else Packed.dequantize(self, torch.float32) @ self.shift.float()
        super().requantize_(W_NK)
        if self.shift is not None and self.offset is not None and before is not None:
            after = Packed.dequantize(self, torch.float32) @ self.shift.float()
            self.offset.copy_(self.offset.float() + before - after)

    def check_branches(self) -> str | None:
        """None when the indices of a loaded sparse branch stay inside the matrix, else what is wrong."""
        sparse = self.sparse
        return None if sparse is None else check_sparse(sparse.starts, sparse.columns, self.in_features)
