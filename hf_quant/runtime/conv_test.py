"""Convolutions as matrices: the same function, taken apart, quantized, put back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_quant.formats import Layer, format_for
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.runtime.activation import fake_quantize, pack_input
from hf_quant.runtime.apart import put_back_all, put_back_floats, take_apart
from hf_quant.runtime.conv import UnfoldedConv, convolutions
from hf_quant.runtime.install import dequantize_model, install_linear
from hf_quant.spec import act_spec, int_spec

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_unfolded_is_the_convolution(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 3)] * n)
    kernel, stride, dilation = (data.draw(sizes) for _ in range(3))
    padding = data.draw(st.one_of(st.just("valid"), st.tuples(*[st.integers(0, 2)] * n)))
    if set(stride) == {1}:
        padding = data.draw(st.sampled_from([padding, "same"]))
    torch.manual_seed(0)
    conv = CONVS[n](3, 5, kernel, stride, padding, dilation, bias=data.draw(st.booleans()), dtype=torch.float64)
    if not UnfoldedConv.takes(conv):
        assert kernel == stride
        return
    x = torch.randn(2, 3, *[9] * n, dtype=torch.float64)
    apart = UnfoldedConv.of(copy.deepcopy(conv))
    assert isinstance(apart, CONVS[n])
    assert apart(x).equal(conv(x))
    watched = apart.matrix.register_forward_pre_hook(lambda *_: None)  # somebody who has to see the rows
    torch.testing.assert_close(apart(x), conv(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(apart(x[0]), conv(x[0]), rtol=1e-10, atol=1e-10)
    watched.remove()
    back = apart.put_back()
    assert type(back) is type(conv)
    assert back(x).equal(conv(x))
    assert list(back.state_dict()) == list(conv.state_dict())


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_range_rounds_an_image_as_it_rounds_its_rows(symmetric: bool) -> None:
    """What is padded with included: zero is on every grid."""
    torch.manual_seed(0)
    conv = UnfoldedConv.of(nn.Conv2d(3, 5, 3, padding=1))
    x, spec = torch.randn(2, 3, 7, 7), act_spec(4, static=True, symmetric=symmetric)
    kept = pack_input(*from_extremes(torch.tensor([[-1.1]]), torch.tensor([[2.3]]), spec))
    rows = fake_quantize(conv.unfold(x).flatten(0, 2), spec, kept)
    image = fake_quantize(x.reshape(-1, 7), spec, kept).reshape(x.shape)
    assert rows.equal(conv.unfold(image).flatten(0, 2))
    assert convolutions(nn.Sequential(conv)) == {conv.matrix: conv}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 16, 3, padding=1),
            "point": nn.Conv2d(16, 16, 1, bias=False),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "patches": nn.Conv2d(3, 8, 4, stride=4),
            "circular": nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        }
    )


def test_what_is_taken_apart_and_put_back() -> None:
    model = net()
    keys = list(model.state_dict())
    assert take_apart(model) == ["first", "point"]
    assert take_apart(model) == []
    assert put_back_floats(model) == ["first", "point"]
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("inputs", [None, act_spec(8), act_spec(8, static=True)])
def test_a_quantized_convolution(inputs) -> None:  # type: ignore[no-untyped-def]
    """Computes what the convolution with the dequantized weight does, on inputs rounded as the spec says."""
    model = net()
    x = torch.randn(2, 3, 8, 8).clamp(-2, 2)
    original = model["first"](x)
    take_apart(model)
    spec = int_spec(8, symmetric=True) if inputs else int_spec(4, 9)
    W_NK = model["first"].matrix.weight
    blocks = as_blocks(W_NK, spec)
    q = nearest(W_NK, *from_extremes(blocks.amin(-1), blocks.amax(-1), spec), spec)
    fmt = format_for(Layer(q.shape, spec, inputs))
    static = inputs is not None and inputs.range == "static"
    input_range = from_extremes(x.amin(), x.amax(), inputs) if static else None
    install_linear(model, "first.matrix", q, fmt, inputs=inputs, input_range=input_range)
    y = model["first"](x)
    assert y.shape == original.shape
    assert 0 < (y - original).norm() / original.norm() < 0.2
    if inputs is None:
        weight = q.dequantize().reshape(16, 3, 3, 3)
        expected = nn.functional.conv2d(x, weight, model["first"].bias, padding=1)
        torch.testing.assert_close(y, expected)
    assert model["first"].weight.shape == (16, 3, 3, 3)
    assert put_back_floats(model) == ["point"]
    dequantize_model(model)
    assert type(model["first"]) is nn.Conv2d
    torch.testing.assert_close(model["first"].weight, q.dequantize().reshape(16, 3, 3, 3))
    assert put_back_all(model) == []
