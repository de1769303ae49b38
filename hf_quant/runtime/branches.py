"""Branches: terms added to a quantized layer's output, in full precision or, of low rank, in 8 or 4 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer, PackedFormat, format_named
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest
from hf_quant.spec import Spec, int_spec

AdapterBits = Literal[16, 8, 4]  # 16: the model's own type
GROUP = 64  # values of a coded factor that share a scale
CHUNK = 1 << 22  # products of inputs and sparse values that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`y += (x down^T) up^T` with `down_RK`, `up_NR`."""

    down_RK: Tensor
    up_NR: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return self.down_RK, self.up_NR

    def matrix(self, rows: slice = slice(None)) -> Tensor:
        """The term, or some rows of it, as a dense float32 `[N, K]`."""
        return self.up_NR[rows].float() @ self.down_RK.float()


@dataclass(frozen=True, slots=True, eq=False)
class CodedLowRank:
    """A `LowRank` whose factors are symmetric integers in groups: `down` of `[R, K]`, `up` of `[N, R]`, one spec."""

    down: QTensor
    up: QTensor

    @property
    def named(self) -> dict[str, Tensor]:
        """What is stored, by the names of a layer's parameters; scales go with the layer's type."""
        parts = {"lr_down": self.down, "lr_up": self.up}
        return {f"{n}_{key}": t for n, q in parts.items() for key, t in factor_format().pack(q).items()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return tuple(self.named.values())

    @property
    def plain(self) -> LowRank:
        """The same term in full precision."""
        return LowRank(self.down.dequantize(), self.up.dequantize())

    def matrix(self, rows: slice = slice(None)) -> Tensor:
        """The term, or some rows of it, as a dense float32 `[N, K]`."""
        return self.plain.matrix(rows)


def factor_format() -> PackedFormat:
    """The format of coded factors."""
    return format_named("int-group/1")


def factor_layers(shape: tuple[int, int], rank: int, spec: Spec) -> dict[str, Layer]:
    """The two coded factors of a branch of an `[N, K]` layer, as their format sees them."""
    return {"lr_down": Layer((rank, shape[1]), spec), "lr_up": Layer((shape[0], rank), spec)}


def check_adapter_bits(bits: int) -> None:
    """Raises `ConfigError` for what no branch is stored in."""
    if type(bits) is not int or bits not in (16, 8, 4):
        raise ConfigError(f"adapter_bits={bits!r}: 16 (the model's own type), 8 or 4")


def stored_in(term: LowRank, bits: AdapterBits) -> "LowRank | CodedLowRank":
    """The term as it is stored: its factors rounded to integers with a scale for each 64 values, or as they are.

    Columns of `up` are brought to one size first (`down` takes it up), since a group lies across all of them.
    """
    if bits == 16:
        return term
    size_R = term.up_NR.float().square().mean(0).sqrt()
    size_R = torch.where(size_R > 0, size_R, 1.0)
    spec = int_spec(bits, GROUP, symmetric=True)
    codes = [_coded(m, spec) for m in (term.down_RK.float() * size_R[:, None], term.up_NR.float() / size_R)]
    return CodedLowRank(*codes)


def _coded(M: Tensor, spec: Spec) -> QTensor:
    blocks = as_blocks(M, spec)
    return nearest(M, *from_extremes(blocks.amin(-1), blocks.amax(-1), spec), spec)


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """`y += x S^T`, S `[N, K]` with few entries that are not zero, row by row (CSR).

    Attributes:
        starts: int32 `[N + 1]`: the entries of row n are `starts[n] .. starts[n + 1] - 1`.
        columns: `[entries]`, ascending within a row; int16 where K allows it, else int32.
        values: `[entries]`.
        width: K.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, S_NK: Tensor, mask_NK: Tensor) -> "Sparse":
        """The entries of a dense matrix where the mask is true."""
        counts = mask_NK.sum(1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        columns = mask_NK.nonzero()[:, 1].to(column_type(S_NK.shape[1]))
        return cls(starts, columns, S_NK[mask_NK], S_NK.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return self.starts, self.columns, self.values

    def matrix(self, rows: slice = slice(None)) -> Tensor:
        """The term, or some rows of it, as a dense float32 `[N, K]`."""
        n, k = rows_of(self.starts), self.columns.long()
        S_NK = torch.zeros(len(self.starts) - 1, self.width, device=self.values.device)
        return S_NK.index_put_((n, k), self.values.float(), accumulate=True)[rows]


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """`y += b_N`: a bias of the method's own, beside the layer's."""

    b_N: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.b_N,)


Branch = LowRank | CodedLowRank | Sparse | Constant


def merged(branches: Sequence[Branch]) -> tuple[LowRank | CodedLowRank | None, Sparse | None]:
    """All low-rank terms as one of the summed rank (in full precision when there are several), all sparse as one."""
    low = [b for b in branches if isinstance(b, LowRank | CodedLowRank)]
    sparse = [b for b in branches if isinstance(b, Sparse)]
    one = low[0] if low else None
    if len(low) > 1:
        plain = [b.plain if isinstance(b, CodedLowRank) else b for b in low]
        one = LowRank(torch.cat([b.down_RK for b in plain]), torch.cat([b.up_NR for b in plain], 1))
    if len(sparse) > 1:
        mask = torch.stack([Sparse(b.starts, b.columns, torch.ones_like(b.values), b.width).matrix() for b in sparse])
        summed = torch.stack([b.matrix() for b in sparse]).sum(0)
        return one, Sparse.of(summed.to(sparse[0].values.dtype), mask.sum(0) > 0)
    return one, sparse[0] if sparse else None


def column_type(width: int) -> torch.dtype:
    """The narrowest integers that number so many columns."""
    return torch.int16 if width <= 1 << 15 else torch.int32


def rows_of(starts: Tensor) -> Tensor:
    """The row of every entry."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device), starts.diff().long())


def check_sparse(starts: Tensor, columns: Tensor, width: int) -> str | None:
    """None when loaded indices stay inside the matrix, else what is wrong."""
    if int(starts[0]) != 0 or int(starts[-1]) != len(columns) or bool((starts.diff() < 0).any()):
        return "sparse_starts does not count the entries of each row"
    if len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= width):
        return f"sparse_columns leaves the {width} columns"
    return None


def _scatter(x_TA: Tensor, take: Tensor, put: Tensor, values: Tensor, width: int) -> Tensor:
    """`y[t, put_i] += x[t, take_i] values_i`, summed in float32, in x's type."""
    y_TB = torch.zeros(x_TA.shape[0], width, dtype=torch.float32, device=x_TA.device)
    step = max(1, CHUNK // max(1, len(values)))
    for start in range(0, x_TA.shape[0], step):
        part = x_TA[start : start + step]
        y_TB[start : start + step].index_add_(1, put, part[:, take].float() * values.float())
    return y_TB.to(x_TA.dtype)


@torch.library.custom_op("hf_quant::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`x S^T`: `[T, K] -> [T, N]` in x's type; one node for torch.compile."""
    return _scatter(x, columns.long(), rows_of(starts), values, len(starts) - 1)


@torch.library.custom_op("hf_quant::sparse_linear_backward", mutates_args=())
def _backward(grad: Tensor, starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    return _scatter(grad, rows_of(starts), columns.long(), values, width)


sparse_linear.register_fake(lambda x, starts, columns, values: x.new_empty(x.shape[0], starts.shape[0] - 1))
_backward.register_fake(lambda grad, starts, columns, values, width: grad.new_empty(grad.shape[0], width))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch's own signature
    x, *stored = inputs
    ctx.save_for_backward(*stored)
    ctx.width = x.shape[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
    return _backward(grad, *ctx.saved_tensors, ctx.width), None, None, None


sparse_linear.register_autograd(_gradient, setup_context=_setup)
