import json

import pytest

from hf_quant.errors import CheckpointError
from hf_quant.report import Entry, Report
from hf_quant.spec import act_spec, int_spec


@pytest.fixture
def report():
    quantized = Entry(
        name="model.layers.0.q_proj.weight",
        shape=(64, 128),
        status="quantized",
        format="int-group/1",
        bits=64 * 128 * 4 + 64 * 24,
        error=0.01,
        error_of="output",
        seconds=0.5,
        spec=int_spec(4, 128).to_json(),
        inputs=act_spec(8).to_json(),
    )
    experts = Entry(name="experts.weight", shape=(4, 8, 32), status="quantized", bits=4 * 8 * 32 * 8)
    kept = Entry(name="lm_head.weight", shape=(100, 64), status="kept", reason="output head", bits=100 * 64 * 16)
    return Report(method={"method": "gptq", "bits": 4}, coverage=(quantized, experts, kept), seconds=3.0)


def test_json_round_trip(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_true_bits_count_all_that_is_stored_for_quantized_weights_alone(report):
    assert report.bits_per_weight == pytest.approx((8192 * 4 + 1536 + 8192) / (8192 + 1024))
    assert [e.values for e in report.quantized] == [8192, 1024]
    assert Report(method={}, coverage=()).bits_per_weight == 0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"method": {}, "coverage": [{"name": "x"}]}', '{"method": {}, "coverage": [], "new": 1}'],
)
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"report\.json is not a report"):
        Report.load(path)
    with pytest.raises(CheckpointError, match="missing"):
        Report.load(tmp_path / "missing")
