import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_quant.errors import UnsupportedModel
from hf_quant.runtime.apart import put_back_all, take_apart
from hf_quant.runtime.experts import Experts, is_fused, refuses

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
