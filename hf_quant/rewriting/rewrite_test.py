"""Scaling an input while the model runs: nothing changes, it is stored and loaded, and it must come first."""

import copy

import pytest
import torch
from torch import nn

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, format_for
from hf_quant.hadamard import Hadamard
from hf_quant.rewriting.rewrite import fold
from hf_quant.runtime.install import install_linear
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.runtime.rotating import rotate_input, scale_of, shift_input
from hf_quant.sites import Site, SiteGroup
from hf_quant.spec import int_spec
from hf_quant.stages.transform import Diagonal

G = torch.Generator().manual_seed(0)
GROUP = SiteGroup(tuple(Site(name, (24, 32), "linear", "") for name in ("0", "1")))  # nothing before it takes scales
S, Z = torch.rand(32, generator=G) + 0.5, torch.randn(32, generator=G)


def layers(dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(32, 24) for _ in range(2)).to(dtype)


@pytest.mark.parametrize("shift", [None, Z])
@torch.no_grad()
def test_without_a_producer_the_layers_divide_their_input(shift: torch.Tensor | None) -> None:
    model, x = layers(torch.float64), torch.randn(5, 32, generator=G).double()
    before = [m(x) for m in model]
    seen: list[torch.Tensor] = []
    fold(model, GROUP, Diagonal(S, shift))
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for module, y in zip(model, before, strict=True):
        torch.testing.assert_close(module(x), y, atol=1e-12, rtol=0)
    want = (x if shift is None else x - shift) / S  # what statistics see, and what is rounded
    torch.testing.assert_close(seen[0], want.double(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_scale_is_stored_beside_the_codes_and_loaded() -> None:
    """In bfloat16: the weight makes up for the scale that is stored, not for the one before it was rounded."""
    model, x = layers(torch.bfloat16), torch.randn(5, 32, generator=G).bfloat16()
    fold(model, GROUP, Diagonal(S))
    stored, spec = scale_of(model[0]), int_spec(8, 16)
    assert stored is not None
    assert stored.dtype == torch.bfloat16
    W, exact = model[0].weight.clone(), layers(torch.bfloat16)[0].weight
    torch.testing.assert_close(W.double() * stored.double(), exact.double(), atol=0, rtol=2**-8)
    layer = install_linear(model, "0", refit(W, spec), format_for(Layer((24, 32), spec)))
    assert torch.equal(layer.pre_scale, stored)
    empty = QuantLinear.from_json(layer.describe(), (24, 32), kind="linear", bias=True, dtype=torch.bfloat16)
    empty.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(empty(x), layer(x))
    assert float((layer(x) - layers(torch.bfloat16)[0](x)).float().abs().max()) < 0.05


def test_scaling_comes_first() -> None:
    for earlier in (lambda m: rotate_input(m, Hadamard(32, 0)), lambda m: shift_input(m, Z)):
        model = layers(torch.float32)
        earlier(model[1])
        with pytest.raises(UnsupportedModel, match="come first"):
            fold(model, GROUP, Diagonal(S))
    with pytest.raises(UnsupportedModel, match="not finite and positive"):
        fold(layers(torch.float32), GROUP, Diagonal(-S))
