import pytest
import torch
import torch.nn.functional as F

from hf_quant.formats import Layer, format_for
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.runtime.shards import refuses
from hf_quant.spec import act_spec, int_spec


def make(spec, n=64, k=128, **extras) -> QuantLinear:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    fmt = format_for(Layer((n, k), spec, extras.get("inputs")))
    return QuantLinear.from_qtensor(refit(W, spec), fmt, bias=torch.randn(n), **extras)


@pytest.mark.parametrize(
    ("spec", "n", "k", "colwise", "rowwise"),
    [
        (int_spec(4, 32), 64, 128, None, None),
        (int_spec(4, 32), 64, 96, None, "96|straddle|cut"),  # 1.5 groups a part
        (int_spec(4, 64), 64, 64, None, "cut"),  # one group is not cut into two
        (int_spec(4, -1), 64, 128, None, "scale"),
        (int_spec(4, 32), 56, 128, "zero_point", None),  # 28 zero points are 3.5 words
        (int_spec(4, 32, symmetric=True), 56, 128, None, None),
        (int_spec(3, 32), 64, 128, None, None),
        (int_spec(4, 32), 63, 128, "63 rows do not divide", None),
    ],
)
def test_what_can_be_cut(spec, n, k, colwise, rowwise):
    module = make(spec, n, k)
    for style, want in (("colwise", colwise), ("rowwise", rowwise)):
        reason = refuses(module, style, 2)
        if want is None:
            assert reason is None
        else:
            assert reason is not None
            assert any(w in reason for w in want.split("|"))


def test_what_hangs_on_a_layer_is_not_cut():
    spec = int_spec(8, -1, symmetric=True)
    assert "lr_down" in refuses(make(spec, branches=[LowRank(torch.ones(2, 128), torch.ones(64, 2))]), "colwise", 2)
    static = make(spec, inputs=act_spec(8, static=True), input_range=(torch.tensor(0.1), None))
    assert "static input range" in refuses(static, "colwise", 2)
    assert "neither" in refuses(make(spec), "sequence_parallel", 2)


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_a_module_that_holds_a_shard_computes_its_part(style):
    """As transformers does it: packed Parameters are cut, the module's own sizes stay those of the whole."""
    module = make(int_spec(4, 32))
    x = torch.randn(3, 128)
    whole, bias, W_NK = module(x), module.bias, module.dequantize()
    parts = []
    for rank in range(2):
        part = make(int_spec(4, 32))
        axis = 0 if style == "colwise" else 1
        for name in ("qweight", "scale", "zero_point"):
            tensor = getattr(module, name).chunk(2, axis)[rank].clone()
            part._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
        part.bias = None
        part.prepare()
        inputs = x if style == "colwise" else x.chunk(2, 1)[rank]
        parts.append(part(inputs))
        torch.testing.assert_close(parts[-1], F.linear(inputs, W_NK.chunk(2, axis)[rank]))
    joined = torch.cat(parts, 1) if style == "colwise" else sum(parts)
    torch.testing.assert_close(joined + bias, whole)
