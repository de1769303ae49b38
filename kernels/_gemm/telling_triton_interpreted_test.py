"""What a model says of its GPU kernels, and tuning it, in the interpreter's process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hf_quant
from hf_quant.errors import ConfigError
from hf_quant.formats import format_named
from hf_quant.hadamard import Hadamard
from hf_quant.kernels._cpu.kernel import NativeKernel
from hf_quant.kernels._gemm import configs, tune
from hf_quant.kernels._gemm.configs import Config, choose, key
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels.int8_act.cpu import Int8Mm
from hf_quant.runtime.branches import LowRank
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, act_spec, int_spec

N, K = 32, 64


@pytest.fixture(autouse=True)
def on_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: None)
    for kernel in (Int8Mm, NativeKernel):
        monkeypatch.setattr(kernel, "supports", lambda *_: "not on a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.remembered.cache_clear()
    choose.cache_clear()
    yield
    configs.remembered.cache_clear()
    choose.cache_clear()


def layer(spec: Spec, format_id: str = "int-group/1", **rest: object) -> QuantLinear:
    W_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return QuantLinear.from_qtensor(refit(W_NK, spec), format_named(format_id), **rest)  # type: ignore[arg-type]


def model() -> nn.Sequential:
    branch = LowRank(torch.randn(2, K), torch.randn(N, 2))
    rotated = {"inputs": act_spec(8), "rotation": Hadamard(K, 0)}
    return nn.Sequential(
        layer(int_spec(4, 32)),
        layer(int_spec(4, 32), branches=[branch]),
        layer(int_spec(4, symmetric=True), **rotated),
        layer(int_spec(8, symmetric=True), "int8-act/1", inputs=act_spec(8)),
        layer(int_spec(8, symmetric=True), "int8-act/1", branches=[branch], **rotated),
    )


def test_a_row_says_what_is_taken_on() -> None:
    rows = hf_quant.explain(model())
    assert {row.kernel for row in rows} == {"triton"}
    assert [row.fused for row in rows] == [(), ("low_rank",), ("rotation",), (), ("low_rank",)]


def test_a_row_says_which_tile_runs_at_how_many_tokens() -> None:
    plain, _, integers, eight, _ = hf_quant.explain(model())
    assert "tensor cores, tiles of 16 tokens" in plain.runs[0][1]
    assert plain.runs[-1] == (None, "dequantized, then the vendor's product")
    for row in (integers, eight):
        assert all("tensor cores" in what for _, what in row.runs)
    for row in (plain, integers, eight):
        assert [upto is None for upto, _ in row.runs] == [False] * (len(row.runs) - 1) + [True]
        assert all(a[1] != b[1] for a, b in zip(row.runs, row.runs[1:], strict=False)), "equal neighbours are one"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Config]]:
    """What was timed; two candidates, of which the second is faster."""
    slow, quick = (Config("tensor", BM=16, BN=16, num_warps=n) for n in (2, 1))
    calls: list[tuple[int, Config]] = []

    def milliseconds(x: Tensor, blob: list[Tensor], weight: Weight, dtype: torch.dtype, config: Config) -> float:
        calls.append((len(x), config))
        return {slow: 2.0, quick: 1.0}.get(config, 3.0)

    monkeypatch.setattr(tune, "candidates", lambda *_: iter((slow, quick)))
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    return calls


def test_tuning_a_model_keeps_the_fastest_and_explain_shows_it(timed: list[tuple[int, Config]]) -> None:
    tuned = model()
    found = hf_quant.tune(tuned, tokens=[1, 16], progress=False)
    weight = Weight((N, K), 4, 32, ranges="scales_and_zeros")
    assert sorted(found) == sorted(key(weight, torch.float32, n) for n in (1, 16)), "layers of a shape share them"
    assert set(found.values()) == {"tensor cores, tiles of 16 tokens x 16 outputs, 1 warps, 4 stages"}
    assert len(timed) == 6
    assert hf_quant.tune(tuned, tokens=[1, 16], progress=False) == {}
    assert len(timed) == 6, "what is known is not timed again"
    runs = dict(hf_quant.explain(tuned)[0].runs)
    assert runs[1] == found[key(weight, torch.float32, 1)]


def test_interrupted_it_goes_on(timed: list[tuple[int, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    work: Callable[..., float] = tune._milliseconds

    def interrupted(x: Tensor, *rest: object) -> float:
        if len(x) == 4:
            raise KeyboardInterrupt
        return work(x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_milliseconds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_quant.tune(model(), tokens=[1, 2, 4, 8], progress=False)
    assert {count for count, _ in timed} == {1, 2}
    timed.clear()
    assert len(hf_quant.tune(model(), tokens=[1, 2, 4, 8], progress=False)) == 2
    assert {count for count, _ in timed} == {4, 8}


def test_what_cannot_be_tuned_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no quantized layer"):
        hf_quant.tune(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="counts of tokens"):
        hf_quant.tune(model(), tokens=[0])
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: "no GPU")
    with pytest.raises(ConfigError, match="GPU, and the model is on cpu: none is available here"):
        hf_quant.tune(model())
