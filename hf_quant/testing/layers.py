"""Synthetic layers for testing solvers: inputs so correlated and unequal that rounding to nearest is far from best."""

import torch
from torch import Tensor

from hf_quant.qtensor import QTensor
from hf_quant.stages.objective import Quadratic


def correlated_layer(N: int, K: int, seed: int = 0, tokens: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[N, K]`, the H of inputs that are strongly correlated and of unequal size, and the D of their drift."""
    g = torch.Generator().manual_seed(seed)
    tokens, rank = tokens or 4 * K, -(-K // 4)
    x = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, K, generator=g) / rank**0.5
    x = (x + 0.3 * torch.randn(tokens, K, generator=g)) * torch.rand(K, generator=g).add(0.5)
    d = x @ torch.randn(K, K, generator=g) * 0.05 / K**0.5
    return torch.randn(N, K, generator=g), 2 / len(x) * x.T @ x, 2 / len(x) * d.T @ x


def output_error(W_NK: Tensor, q: QTensor | Tensor, quadratic: Quadratic) -> float:
    """`tr(E H E^T) + 2 tr(W D E^T)` in float64."""
    Q = q if isinstance(q, Tensor) else q.dequantize()
    E, H = (W_NK - Q).double(), quadratic.H_KK.double()
    error = float(((E @ H) * E).sum())
    if quadratic.D_KK is not None:
        error += 2 * float(((W_NK.double() @ quadratic.D_KK.double()) * E).sum())
    return error


def same(a: QTensor, b: QTensor) -> bool:
    """Bit for bit the same codes, scales and zeros."""
    zeros = a.zero is b.zero is None or (a.zero is not None and b.zero is not None and a.zero.equal(b.zero))
    return a.codes.equal(b.codes) and a.scale.equal(b.scale) and zeros
