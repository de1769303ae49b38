from fnmatch import fnmatchcase

import pytest
from torch import nn

from hf_quant.sites import covering, kept_reason, linear_shape

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
