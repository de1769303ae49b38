import pytest

from hf_quant.grids import LevelGrid
from hf_quant.pages.describe import call, count, groups, megabytes, seconds, short_spec
from hf_quant.report import Report
from hf_quant.spec import Spec, act_spec, int_spec


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (int_spec(4, 128), "4-bit integers, asymmetric, groups of 128, bfloat16 scales"),
        (int_spec(8, symmetric=True), "8-bit integers, symmetric, per output channel, bfloat16 scales"),
        (act_spec(8), "8-bit integers, symmetric, per token, float32 scales, computed at run time"),
        (act_spec(8, static=True, symmetric=False), "8-bit integers, asymmetric, per tensor, float32 scales"),
        (
            Spec(grid=LevelGrid((-1.0, 0.0, 1.0)), block=(16, 16)),
            "3 levels, symmetric, blocks of 16 x 16, bfloat16 scales",
        ),
        (
            Spec(grid=LevelGrid((-1.0, 1.0)), index="timestep"),
            "2 levels, symmetric, per output channel, per timestep, bfloat16 scales",
        ),
    ],
)
def test_specs_in_words(spec, said):
    assert short_spec(spec.to_json()) == said


def test_no_spec_is_full_precision():
    assert short_spec(None) == "full precision"


def test_the_call_that_was_made():
    method = {"quant_method": "hf_quant", "version": 1, "method": "gptq", "bits": 4, "damp": None, "seed": 0}
    assert call(method) == 'QuantConfig("gptq", bits=4)'
    assert call(method | {"seed": 3, "overrides": {"*.v": {"bits": 8}}}) == (
        "QuantConfig(\"gptq\", bits=4, overrides={'*.v': {'bits': 8}}, seed=3)"
    )


def test_groups_hold_every_quantized_layer_once(report):
    found = groups(report)
    assert [(g[0], g[3]) for g in found] == [("q_proj", 3), ("down_proj", 3), ("up_proj", 1)]
    assert found[0][4] == pytest.approx(4 + 24 / 128)
    assert found[2][2] == "8-bit integers, symmetric, per token, float32 scales, computed at run time"
    assert groups(Report(method={}, coverage=())) == []


@pytest.mark.parametrize(("value", "said"), [(7, "7"), (1024, "1.02k"), (13898240, "13.9M"), (7.2e9, "7.2B"), (0, "0")])
def test_count(value, said):
    assert count(value) == said


@pytest.mark.parametrize(("value", "said"), [(12, "12 B"), (9_876_543, "9.88 MB"), (14e9, "14 GB")])
def test_megabytes(value, said):
    assert megabytes(value) == said


@pytest.mark.parametrize(
    ("value", "said"), [(0.1234, "0.123 s"), (59.9, "59.9 s"), (132.5, "2 min 12 s"), (7265, "2 h 1 min")]
)
def test_seconds(value, said):
    assert seconds(value) == said
