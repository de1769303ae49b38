"""A small report and a small evaluation, as a run would leave them."""

import pytest

from hf_quant.measure.evaluation import Evaluation
from hf_quant.report import Entry, Report
from hf_quant.spec import Spec, act_spec, int_spec


def quantized(name: str, bits: int, error: float, inputs: Spec | None = None, reason: str = "") -> Entry:
    return Entry(
        name=name,
        shape=(64, 128),
        status="quantized",
        reason=reason,
        format="int-group/1",
        bits=64 * 128 * bits + 64 * 24,
        error=error,
        error_of="output",
        seconds=0.25,
        spec=int_spec(bits, 128).to_json(),
        inputs=inputs.to_json() if inputs else None,
    )


@pytest.fixture
def report() -> Report:
    layers = [
        quantized(f"model.layers.{block}.{kind}.weight", bits, error * (block + 1))
        for block in range(3)
        for kind, bits, error in (("self_attn.q_proj", 4, 0.002), ("mlp.down_proj", 8, 0.0001))
    ]
    return Report(
        method={"quant_method": "hf_quant", "version": 1, "method": "rtn", "bits": 4, "group_size": 128, "seed": 7},
        coverage=(
            *layers,
            quantized("model.layers.2.mlp.up_proj.weight", 4, 0.5, act_spec(8), "never reached by calibration"),
            Entry(name="lm_head.weight", shape=(100, 64), status="kept", reason="output head", bits=100 * 64 * 16),
            Entry(name="odd.weight", shape=(40, 40), status="unsupported", reason="no rule", bits=40 * 40 * 16),
        ),
        seconds=132.5,
        peak_bytes=912_000_000,
        calibration={"source": "docs.txt", "samples": 128, "tokens": 65536, "fingerprint": "ab" * 32},
        versions={"torch": "2.13.0", "hf-quant": "0.1.0"},
    )


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        kl=0.00311,
        top1=95.96,
        perplexity=24.157,
        reference_perplexity=24.107,
        kl_error=0.00006,
        top1_error=0.21,
        perplexity_error=1.5,
        loss_increase=0.00207,
        loss_increase_error=0.0004,
        windows=64,
        window=512,
        data="small_test.npy",
        bits_per_weight=4.156,
        bytes_on_disk=9_876_543,
        peak_bytes=700_000_000,
        peak_holds="the model and the reference",
        tokens_per_second=931.2,
        batch_size=8,
        device="cpu, 2 threads",
        dtype="float32",
        seconds=72.0,
        command="hf-quant evaluate out --reference small-lm --data small_test.npy",
    )
