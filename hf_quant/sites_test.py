from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.sites import covering, find_blocks, kept_reason, linear_shape

NAMES = ["a.0.x", "a.0.y", "a.1.x", "a.1.y", "a.10.x", "b"]


@pytest.mark.parametrize(
    ("chosen", "want"),
    [
        (["a.0.x"], ["a.0.x"]),
        (["a.0.x", "a.0.y"], ["a.0.*"]),
        (["a.1.x", "a.1.y", "b"], ["a.1.*", "b"]),
        (["a.10.x"], ["a.10.*"]),
        (NAMES[:5], ["a.*"]),
        ([], []),
    ],
)
def test_covering_globs_match_what_was_chosen_and_nothing_else(chosen, want):
    globs = covering(chosen, NAMES)
    assert globs == want
    assert [n for n in NAMES if any(fnmatchcase(n, g) for g in globs)] == sorted(chosen, key=NAMES.index)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm_head", "output head"),
        ("lm_head.dense", "output head"),
        ("bert.pooler.dense", "output head"),
        ("score", "output head"),
        ("model.layers.3.mlp.gate", "router"),
        ("encoder.block.1.mlp.router.classifier", "output head"),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.3.self_attn.q_proj", None),
    ],
)
def test_what_is_kept_by_its_name(name, reason):
    assert kept_reason(name) == reason


def test_only_what_multiplies_like_a_linear_layer_is_one():
    class FalconLinear(nn.Linear):
        pass

    class Other(nn.Linear):
        pass

    assert linear_shape(nn.Linear(3, 5)) == linear_shape(FalconLinear(3, 5)) == ("linear", (5, 3))
    assert linear_shape(Other(3, 5)) is None
    assert linear_shape(nn.LayerNorm(3)) is None


class Shared(nn.Module):
    """An MLP that refines what two blocks make: its layers run once for each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))
        self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 32)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            for layer in self.layers:
                x = layer(x)
        return (x,)


def test_bare_layers_in_a_list_are_no_blocks_and_may_run_again():
    model = Shared()
    assert find_blocks(model) == ["blocks.0", "blocks.1"]
    data = [{"x": torch.randn(16, 32, generator=torch.Generator().manual_seed(0))}]
    report = hf_quant.quantize(model, QuantConfig("gptq", group_size=32), data=data, progress=False)
    assert [e.name for e in report.quantized if e.error_of == "output"] == [
        "blocks.0.0.weight",
        "blocks.1.0.weight",
        "layers.0.weight",
        "layers.1.weight",
    ]
