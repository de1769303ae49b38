import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, format_for
from hf_quant.runtime.apart import put_back_all, take_apart
from hf_quant.runtime.experts import Experts, is_fused, refuses
from hf_quant.runtime.install import dequantize_model
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

H, I, E, T, TOP = 12, 8, 4, 10, 2


def fused(kind: str) -> nn.Module:
    sizes = {"hidden_size": H, "intermediate_size": I}
    config, cls = {
        "mixtral": (MixtralConfig(**sizes, num_local_experts=E), MixtralExperts),
        "qwen3_moe": (Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E), Qwen3MoeExperts),
        "gpt_oss": (GptOssConfig(**sizes, num_local_experts=E), GptOssExperts),
    }[kind]
    config._experts_implementation = "eager"
    module = cls(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return module


def routing():
    g = torch.Generator().manual_seed(1)
    index = torch.rand(T, E, generator=g)[:, 1:].topk(TOP).indices + 1  # expert 0 is never reached
    return torch.randn(T, H, generator=g), index, torch.rand(T, TOP, generator=g)


kinds = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])


@kinds
def test_same_function_unfused(kind):
    module, args = fused(kind), routing()
    torch.testing.assert_close(Experts(module)(*args), module(*args))


@kinds
def test_members_are_plain_linears_on_the_fused_storage(kind):
    module = fused(kind)
    member = Experts(module).expert(2).gate_up
    assert type(member) is nn.Linear
    assert member.weight.shape == (2 * I, H)
    with torch.no_grad():
        module.gate_up_proj.add_(1)
    rows = module.gate_up_proj[2].T if kind == "gpt_oss" else module.gate_up_proj[2]
    assert torch.equal(member.weight, rows)


@kinds
def test_fuse_is_the_inverse(kind):
    module, args = fused(kind), routing()
    back = Experts(copy.deepcopy(module)).put_back()
    assert type(back) is type(module)
    for name, value in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    assert torch.equal(back(*args), module(*args))


@kinds
def test_compiles_whole(kind):
    experts, args = Experts(fused(kind)), routing()
    torch.testing.assert_close(torch.compile(experts, fullgraph=True, backend="aot_eager")(*args), experts(*args))


def test_tokens_of_other_ranks_are_left_out():
    experts = Experts(fused("mixtral"))
    x, index, weights = routing()
    index[0] = E
    assert not experts(x, index, weights)[0].any()


def test_only_what_reaches_an_expert_runs_it():
    experts, seen = Experts(fused("mixtral")), []
    for e in range(E):
        experts.expert(e).down.register_forward_hook(lambda *_, e=e: seen.append(e))
    experts(*routing())
    assert 0 not in seen
    assert set(seen) <= {1, 2, 3}


def test_whole_models():
    model = nn.ModuleDict({"a": fused("mixtral"), "b": nn.Linear(2, 2)})
    assert is_fused(model["a"])
    assert not is_fused(model["b"])
    assert take_apart(model) == ["a"]
    assert isinstance(model["a"], Experts)
    assert put_back_all(model) == ["a"]
    assert isinstance(model["a"], MixtralExperts)


def test_unknown_experts_are_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    assert "experts interface" in refuses(Other())
    with pytest.raises(UnsupportedModel, match="experts interface"):
        Experts(Other())


def test_member_names_meet_no_conversion_pattern():
    """transformers fuses and splits experts by name at load and save; ours must pass through both unchanged."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    met = []
    for conversions in _build_checkpoint_conversion_mapping().values():
        for conversion in conversions:
            if not isinstance(conversion, WeightConverter):
                continue
            for direction in (conversion, conversion.reverse_transform()):
                for member in ("gate_up", "down"):
                    for tensor in ("qweight", "scale", "zero_point", "bias", "weight", "lr_down"):
                        for container in ("mlp", "block_sparse_moe", "feed_forward", "mixer"):
                            key = f"model.layers.0.{container}.experts.0.{member}.{tensor}"
                            if direction.rename_source_key(key)[1] is not None:
                                met.append((key, direction))
    assert not met


def quantized(kind: str, spec: Spec, dtype: torch.dtype, inputs: Spec | None = None) -> Experts:
    experts = Experts(fused(kind).to(dtype))
    for e in range(E):
        for member in ("gate_up", "down"):
            layer = getattr(experts.expert(e), member)
            q = refit(layer.weight.detach(), spec)
            bias = None if layer.bias is None else layer.bias.to(dtype)
            fmt = format_for(Layer(q.shape, spec, inputs))
            setattr(experts.expert(e), member, QuantLinear.from_qtensor(q, fmt, bias=bias, inputs=inputs, dtype=dtype))
    return experts


def apart(experts: Experts, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One expert after the other: what a hook makes it do."""
    experts = copy.deepcopy(experts)
    experts.expert(0).down.register_forward_hook(lambda *_: None)
    y = experts(*args)
    assert experts._groups["down"] is None
    return y


LAYERS = [
    (int_spec(4, 4), torch.float32, None),
    (int_spec(3, 4, symmetric=True), torch.bfloat16, None),
    (int_spec(8, symmetric=True), torch.bfloat16, act_spec(8)),
]


@kinds
@pytest.mark.parametrize(("spec", "dtype", "inputs"), LAYERS)
def test_quantized_experts_are_two_products(kind, spec, dtype, inputs):
    experts = quantized(kind, spec, dtype, inputs)
    x, index, weights = routing()
    index[0, 0], index[1, 1] = E, -1  # of other ranks
    args = (x.to(dtype), index, weights)
    y = experts(*args)
    assert y.dtype == dtype
    assert experts._groups["gate_up"] is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.2}
    torch.testing.assert_close(y, apart(experts, args), **tolerance)
    if inputs is None:
        plain = dequantize_model(nn.ModuleDict({"a": copy.deepcopy(experts)}))["a"]
        index[0, 0], index[1, 1] = 1, 1
        assert is_fused(plain)
        torch.testing.assert_close(experts(*args), plain(*args), **tolerance)


@kinds
def test_gradients_of_quantized_experts(kind):
    experts, (x, *routed) = quantized(kind, int_spec(4, 4), torch.float32), routing()
    plain = dequantize_model(nn.ModuleDict({"a": copy.deepcopy(experts)}))["a"]
    grads = []
    for module in (experts, plain):
        mine = x.clone().requires_grad_()
        module(mine, *routed).square().sum().backward()
        grads.append(mine.grad)
    assert experts._groups["down"] is not None
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@kinds
def test_quantized_experts_compile_whole(kind, monkeypatch):
    """Before any forward and after; only experts that were chosen run."""
    torch.compiler.reset()
    experts, args = quantized(kind, int_spec(4, 4), torch.float32), routing()
    monkeypatch.setattr(Experts, "_dense", lambda *_: pytest.fail("every expert runs"))
    x = args[0].clone().requires_grad_()
    y = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, *args[1:])
    y.sum().backward()
    torch.testing.assert_close(y, experts(*args))
    mine = args[0].clone().requires_grad_()
    experts(mine, *args[1:]).sum().backward()
    torch.testing.assert_close(x.grad, mine.grad)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_of_experts_that_nobody_chose_are_not_read(monkeypatch, compiled):
    torch.compiler.reset()
    experts, args = quantized("mixtral", int_spec(4, 4), torch.float32), routing()
    fmt, read = experts.expert(0).down.format, []
    whole = type(fmt).weight

    def weight(self, tensors, layer, dtype):
        read.append(tensors["qweight"].data_ptr())
        return whole(self, tensors, layer, dtype)

    monkeypatch.setattr(type(fmt), "weight", weight)
    (torch.compile(experts, fullgraph=True, backend="aot_eager") if compiled else experts)(*args)
    chosen = {
        getattr(experts.expert(e), m).qweight.data_ptr() for e in args[1].unique().tolist() for m in ("gate_up", "down")
    }
    assert set(read) == chosen
    assert experts.expert(0).down.qweight.data_ptr() not in chosen


def test_groups_follow_their_layers():
    """Whatever changes a layer is seen: a load, a move, another kind, a hook."""
    experts, args = quantized("mixtral", int_spec(4, 4), torch.float32), routing()
    y = experts(*args)
    other = copy.deepcopy(experts)
    assert other._groups == {}
    assert torch.equal(other(*args), y)
    assert torch.equal(pickle.loads(pickle.dumps(experts))(*args), y)
    codes = {k: torch.zeros_like(v) if k.endswith("qweight") else v for k, v in experts.state_dict().items()}
    other.load_state_dict(codes)
    assert not torch.equal(other(*args), y)
    other.load_state_dict(experts.state_dict())
    assert torch.equal(other(*args), y)
    assert torch.equal(other.double().float()(*args), y)
    layer = other.expert(2).down
    other.expert(2).down = QuantLinear.from_qtensor(
        refit(layer.dequantize(), int_spec(8, 4)), layer.format, dtype=torch.float32
    )
    torch.testing.assert_close(other(*args), y, rtol=0.1, atol=0.1)
    assert other._groups["gate_up"] is not None
    assert other._groups["down"] is None


def test_the_operator():
    experts, (x, chosen, _) = quantized("mixtral", int_spec(4, 4), torch.float32), routing()
    experts.lay_out()
    g = experts._groups["gate_up"]
    args = (x.requires_grad_(), chosen, g.tensors, g.blob, g.fmt.id, g.layer.key, g.kernel, E)
    torch.library.opcheck(torch.ops.hf_quant.experts.default, args)
