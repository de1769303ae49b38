"""A table of input ranges by timestep: the product looks up every token's row and multiplies integers."""

from dataclasses import replace

import pytest
import torch

from hf_quant.formats import Layer, format_for
from hf_quant.grids import LevelGrid
from hf_quant.kernels._cpu import native
from hf_quant.kernels.bnb_4bit.format import NF4
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import Spec, act_spec, int_spec

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no native product: {native.why_not()}")
N, K = 40, 96


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("weights", "fused"),
    [
        (int_spec(4, 32), {"entry_T"}),
        (int_spec(8, -1, symmetric=True), {"entry_T"}),
        (Spec(grid=LevelGrid(NF4), block=(1, 32)), set()),
    ],
)
def test_it_is_what_rounding_before_the_product_gives(weights: Spec, fused: set[str], symmetric: bool) -> None:
    """Other timesteps for each sample included, and the gradient to the input. Tables are multiplied by floats."""
    torch.manual_seed(0)
    W_NK, x = torch.randn(N, K), torch.randn(2, 5, K)
    blocks = as_blocks(W_NK, weights)
    q = nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), weights), weights)
    inputs = replace(act_spec(8, static=True, symmetric=symmetric), index="timestep", entries=3)
    ranges = torch.tensor([[0.01], [0.03], [0.02]]), None if symmetric else torch.tensor([[100.0], [128.0], [90.0]])
    fmt = format_for(Layer((N, K), weights, inputs))
    layer = QuantLinear.from_qtensor(q, fmt, inputs=inputs, input_range=ranges)
    layer.clock = Clock((0, 10, 20))
    assert layer.kernel == "native-cpu"
    assert layer.fused == fused
    found = []
    for steps in ([0, 0], [19, 1], [11]):
        layer.clock.set_to(torch.tensor(steps))
        entry = layer.clock.entry_B.expand(2)
        at = (x / ranges[0][entry][:, None] + (0 if symmetric else ranges[1][entry][:, None])).round()
        at = at.clamp(inputs.grid.low, inputs.grid.high) - (0 if symmetric else ranges[1][entry][:, None])
        wanted = at * ranges[0][entry][:, None] @ q.dequantize().T
        own = x.clone().requires_grad_()
        y = layer(own)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        y.sum().backward()
        torch.testing.assert_close(own.grad, q.dequantize().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
        found.append(y.detach())
    assert not torch.equal(found[0], found[1])
