"""The synthetic layer is what it says: the Gram matrix and drift of one sample, correlated, with an error to win."""

import torch

from hf_quant.qtensor import nearest
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.testing.layers import correlated_layer, output_error, same


def test_the_inputs_are_correlated_and_of_unequal_size() -> None:
    _, H, D = correlated_layer(4, 64)
    root = H.diagonal().sqrt()
    assert root.max() > 2 * root.min()
    assert ((H / root / root[:, None]).abs().mean() - 1 / 64) > 0.1
    assert torch.linalg.eigvalsh(H.double()).min() > 0
    assert 0 < D.norm() < 0.2 * H.norm()


def test_the_error_is_that_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(0)
    x, d, W = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g), torch.randn(3, 8, generator=g)
    q = nearest(W, *AbsMaxRange().fit(W, int_spec(3)), int_spec(3))
    full, rounded = (x + d) @ W.T, x @ q.dequantize().T
    fixed = (d @ W.T).square().sum()  # what no code can change
    found = output_error(W, q, Quadratic(x.T @ x, d.T @ x)) + fixed
    assert torch.allclose(found.double(), (full - rounded).square().sum().double(), rtol=1e-4)
    assert same(q, q)
    assert not same(q, nearest(W + 1, q.scale, q.zero, q.spec))
