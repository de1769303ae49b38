import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_quant.errors import ConfigError, UnsupportedSpec
from hf_quant.formats import Layer, format_for
from hf_quant.hadamard import Hadamard
from hf_quant.ledger import site_bits
from hf_quant.qtensor import from_extremes
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import expose_logical_weights, refit
from hf_quant.runtime.shards import refuses
from hf_quant.runtime.weight_view import WeightView
from hf_quant.spec import Spec, act_spec, int_spec

N, K = 48, 100


def make(
    spec: Spec | None = None, dtype=torch.float32, bias=True, extras=True, inputs=None, seed=0, rotation=None
) -> QuantLinear:
    g = torch.Generator().manual_seed(seed)
    spec = spec or int_spec(4, 32)
    W = torch.randn(N, K, generator=g) * 0.05
    branches = [LowRank(torch.randn(r, K, generator=g) * 0.01, torch.randn(N, r, generator=g) * 0.01) for r in (1, 2)]
    input_range = None
    if inputs is not None and inputs.range == "static":
        input_range = from_extremes(torch.tensor(-3.0), torch.tensor(3.0), inputs)
    return QuantLinear.from_qtensor(
        refit(W, spec),
        format_for(Layer((N, K), spec, inputs)),
        bias=torch.randn(N, generator=g).to(dtype) if bias else None,
        inputs=inputs,
        input_range=input_range,
        pre_scale=torch.rand(K, generator=g) + 0.5 if extras else None,
        branches=branches if extras else (),
        rotation=rotation,
        dtype=dtype,
    )


def x(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("extras", [False, True])
def test_forward_is_the_logical_weight(shape, extras):
    layer = make(extras=extras)
    torch.testing.assert_close(layer(x(*shape)), nn.functional.linear(x(*shape), layer.dequantize(), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_any_activation_type(dtype, compute):
    layer = make(dtype=compute)
    y = layer(x(2, dtype=dtype))
    assert y.dtype == dtype
    want = nn.functional.linear(x(2).double(), layer.dequantize(torch.float64), layer.bias.double())
    torch.testing.assert_close(y.double(), want, atol=0.05, rtol=0.05)


def test_autocast_like_a_plain_linear():
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", [None, act_spec(8), act_spec(8, static=True, symmetric=False)])
def test_compiles_whole(inputs):
    layer = make(inputs=inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x(2, 3)), layer(x(2, 3)), rtol=0, atol=0)


def test_weight_metadata_and_weight_itself_compile():
    layer = make()

    def through_weight(x):
        return nn.functional.linear(x.to(layer.weight.dtype), layer.weight)

    compiled = torch.compile(through_weight, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x(3)), through_weight(x(3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_and_checkpointing(reentrant):
    layer = make()
    a, b = (x(2, 3).requires_grad_() for _ in range(2))
    layer(a).square().sum().backward()
    checkpoint(layer, b, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    c = x(2, 3).requires_grad_()
    nn.functional.linear(c, layer.dequantize(), layer.bias).square().sum().backward()
    torch.testing.assert_close(a.grad, c.grad, atol=1e-4, rtol=1e-4)


def test_static_range_is_stored():
    layer = make(inputs=act_spec(8, static=True, symmetric=False))
    assert {"input_scale", "input_zero_point"} <= set(layer.state_dict())
    clipped = layer.qtensor().dequantize()
    assert not torch.allclose(layer(x(4) * 9), nn.functional.linear(x(4) * 9, clipped, layer.bias), atol=1e-2)


def test_scales_that_float16_cannot_hold_stay_as_they_are():
    layer = make(extras=False)
    with torch.no_grad():
        layer.scale.mul_(2.0**-20)
    want = layer.dequantize()
    assert torch.equal(layer.half().dequantize(torch.float32), want)
    assert layer.compute_dtype == torch.float16
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_keep_packed_tensors(dtype):
    layer = make()
    before = {n: layer.state_dict()[n].clone() for n in layer.packed_tensors()}
    layer.to(dtype)
    assert next(p.dtype for p in layer.parameters() if p.is_floating_point()) == dtype
    assert layer.compute_dtype == layer.weight.dtype == layer.bias.dtype == layer.lr_up.dtype == dtype
    for name, tensor in layer.packed_tensors().items():
        assert torch.equal(tensor.double(), before[name].double())
        assert layer.state_dict()[name].dtype == before[name].dtype
    assert layer(x(2, dtype=dtype)).dtype == dtype


def test_float8_casts_leave_the_module_usable():
    layer = make(extras=False, bias=False)
    y = layer(x(2))
    layer.to(torch.float8_e4m3fn).to(torch.float32)  # diffusers' layerwise casting
    assert torch.equal(layer(x(2)), y)


def test_upcast_scales_run_and_are_saved_in_their_own_type():
    layer = make(dtype=torch.bfloat16, extras=False)
    saved = layer.state_dict()
    y = layer(x(2, dtype=torch.bfloat16))
    for p in layer.parameters():  # what PEFT's prepare_model_for_kbit_training does
        if p.dtype == torch.bfloat16:
            p.data = p.data.to(torch.float32)
    assert layer.scale.dtype == torch.float32
    torch.testing.assert_close(layer(x(2)), y.float(), atol=0.05, rtol=0.05)
    for name in ("qweight", "scale", "zero_point"):
        assert torch.equal(layer.state_dict()[name], saved[name])
        assert layer.state_dict()[name].dtype == saved[name].dtype


def test_copies_run():
    layer = make()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x(2)), layer(x(2)))
        copied.bias.data.zero_()
        assert not torch.equal(copied(x(2)), layer(x(2)))


def test_json_gives_the_same_tree_on_meta_and_state_loads():
    layer = make(inputs=act_spec(8, static=True))
    empty = QuantLinear.from_json(layer.describe(), (N, K), kind="linear", bias=True, dtype=torch.float32)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
    }
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x(2)), layer(x(2)))


def test_loading_another_state_is_seen_by_the_kernel():
    a, b = make(seed=0), make(seed=5)
    want = b(x(2))
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(x(2)), want)


def test_nothing_trains():
    assert not any(p.requires_grad for n, p in make().named_parameters() if n != "bias")


class TestWeightView:
    def test_metadata_is_free(self, monkeypatch):
        layer = make()
        monkeypatch.setattr(QuantLinear, "dequantize", lambda *_: pytest.fail("dequantized"))
        w = layer.weight
        assert (w.shape, w.dtype, w.device.type, w.dim(), w.requires_grad) == ((N, K), torch.float32, "cpu", 2, False)
        assert isinstance(w.data, WeightView)
        assert isinstance(w.detach(), WeightView)
        assert "WeightView" in repr(w)

    def test_ops_see_the_dense_weight(self):
        layer = make()
        dense = layer.dequantize()
        assert torch.equal(layer.weight + 0, dense)
        assert torch.equal(layer.weight.T, dense.T)
        assert torch.equal(layer.weight[3:5], dense[3:5])
        assert torch.equal(torch.linalg.vector_norm(layer.weight, dim=1), torch.linalg.vector_norm(dense, dim=1))
        assert torch.equal(copy.deepcopy(layer.weight), dense)
        assert torch.equal(pickle.loads(pickle.dumps(layer.weight)), dense)

    @pytest.mark.parametrize("write", ["data", "iadd", "method", "item", "attribute", "parameter", "out"])
    def test_writes_quantize_back(self, write):
        layer = make(int_spec(8, 32))
        want = layer.dequantize() + 0.03
        if write == "data":
            layer.weight.data = want
        elif write == "iadd":
            layer.weight.data += 0.03
        elif write == "method":
            layer.weight.add_(0.03)
        elif write == "item":
            layer.weight[:] = want
        elif write == "attribute":
            layer.weight = want
        elif write == "parameter":
            layer.weight = nn.Parameter(want)
        else:
            torch.add(want, 0, out=layer.weight)
        # ranges grow to hold zero and the shifted values: at most 0.4 / 255 a step
        torch.testing.assert_close(layer.dequantize(), want, atol=2e-3, rtol=0)
        torch.testing.assert_close(layer(x(3)), nn.functional.linear(x(3), layer.dequantize(), layer.bias))

    def test_reading_never_writes(self):
        layer = make()
        before = layer.qweight.clone()
        torch.add(layer.weight, 1, out=torch.empty(N, K))
        layer.weight = layer.weight
        layer.weight.data = layer.weight.data
        assert torch.equal(layer.qweight, before)

    def test_wrong_shape_is_refused(self):
        with pytest.raises(UnsupportedSpec, match="cannot be assigned"):
            make().weight = torch.zeros(N + 1, K)

    def test_state_dict_lists_logical_weights_on_request(self):
        layer = make()
        with expose_logical_weights():
            assert layer.state_dict()["weight"].shape == (N, K)
        assert "weight" not in layer.state_dict()


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_layout_is_made_at_first_use_or_before_compiling(compiled_first):
    g = torch.Generator().manual_seed(0)
    spec = int_spec(4, 32)
    q = refit(torch.randn(64, 96, generator=g), spec)
    layer = QuantLinear.from_qtensor(q, format_for(Layer((64, 96), spec)), dtype=torch.bfloat16)
    assert layer.kernel != "reference"
    assert layer._blob is None
    inputs = torch.randn(2, 96, generator=g).bfloat16()
    torch.compile(lambda x: x + 1, backend="eager")(inputs)  # a compilation before is no excuse, nor is a reset
    torch._dynamo.reset()
    layer.prepare()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled_first else layer
    first = run(inputs)
    assert layer._blob
    assert torch.equal(first, layer(inputs))
    whole = torch.nn.functional.linear(inputs, layer.dequantize())
    assert not torch.equal(first, whole)  # the kernel ran, which rounds in another place than the reference
    torch.testing.assert_close(first, whole, rtol=0.05, atol=0.1)


class TestRotation:
    rotation = Hadamard(20, seed=3)

    def test_forward_is_the_logical_weight(self):
        layer = make(rotation=self.rotation)
        torch.testing.assert_close(layer(x(2, 3)), nn.functional.linear(x(2, 3), layer.dequantize(), layer.bias))
        assert torch.equal(layer.weight + 0, layer.dequantize())
        R = self.rotation.matrix(K, torch.float32)
        plain = make()
        want = plain.dequantize() / plain.pre_scale @ R.T * plain.pre_scale
        torch.testing.assert_close(layer.dequantize(), want)

    def test_inputs_are_rounded_after_the_rotation(self):
        layer = make(extras=False, inputs=act_spec(4), rotation=self.rotation)
        plain = make(extras=False, inputs=act_spec(4))
        torch.testing.assert_close(layer(x(5)), plain(x(5) @ self.rotation.matrix(K, torch.float32)))

    def test_weights_written_are_stored_rotated(self):
        layer = make(int_spec(8, 20), rotation=self.rotation)
        want = layer.dequantize() + 0.03
        layer.weight.data = want
        torch.testing.assert_close(layer.dequantize(), want, atol=4e-3, rtol=0)

    @pytest.mark.parametrize("inputs", [None, act_spec(4)])
    def test_compiles_whole_with_the_gradient_of_the_logical_weight(self, inputs):
        layer = make(inputs=inputs, rotation=self.rotation)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        a, b = (x(2, 3).requires_grad_() for _ in range(2))
        torch.testing.assert_close(compiled(a), layer(a), rtol=0, atol=0)
        compiled(a).sum().backward()
        (b @ layer.dequantize().T).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)

    def test_saved_as_two_numbers(self):
        layer, plain = make(rotation=self.rotation), make()
        assert site_bits(layer) == site_bits(plain)
        empty = QuantLinear.from_json(layer.describe(), (N, K), kind="linear", bias=True, dtype=torch.float32)
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(empty(x(2)), layer(x(2)))
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x(2)), layer(x(2)))

    def test_what_does_not_fit_is_refused(self):
        data = make().describe()
        with pytest.raises(ConfigError, match="order 100 "):
            QuantLinear.from_json(
                {**data, "rotation": {"size": 200, "seed": 1}}, (N, K), kind="linear", bias=True, dtype=torch.float32
            )
        with pytest.raises(ConfigError, match="newer"):
            QuantLinear.from_json({**data, "warp": 1}, (N, K), kind="linear", bias=True, dtype=torch.float32)
        assert "rotated" in refuses(make(extras=False, rotation=self.rotation), "rowwise", 2)
