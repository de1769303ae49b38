"""The benchmarks in a dry form: tiny shapes on CPU, with what runs there."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_quant.kernels.bench import cpu, decoding, linear, operations, run, tables, warm
from hf_quant.kernels.bench.contenders import CONTENDERS, Contender
from hf_quant.kernels.bench.cpu_peers import PEERS, Peer
from hf_quant.kernels.bench.timing import interleaved

CPU, OTHERS = torch.device("cpu"), {"torch", "tinygemm", "gemlite", "Marlin"}
EARLY, LATE = time.monotonic() - 1, time.monotonic() + 1e6


def fails(*_: object) -> Any:
    raise ImportError("no such library\nmore of it")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    names = [c for c in CONTENDERS if not c.name.startswith(("tinygemm", "gemlite", "Marlin"))]
    dry = [replace(c, tokens=lambda _: True) for c in names] + [Contender("absent", fails)]
    return {
        "machine": {"device": "a test", "torch": torch.__version__},
        "decoding": decoding.measure(CPU, LATE, [dry[0], dry[1]], shapes={"tiny": decoding.TINY}, seconds=0),
        "operations": operations.measure(CPU, LATE, shape=(256, 512), tokens=[1, 5], seconds=0),
        "linear": linear.measure(CPU, LATE, shapes=[(256, 512)], tokens=[1, 5], contenders=dry, seconds=0),
    }


def test_every_contender_of_ours_is_measured(measured: dict[str, Any]) -> None:
    rows = measured["linear"]["rows"]
    assert [(r["shape"], r["tokens"]) for r in rows] == [([256, 512], 1), ([256, 512], 5)]
    ours = {c.name for c in CONTENDERS if not c.name.startswith(("tinygemm", "gemlite", "Marlin"))}
    for row in rows:
        assert set(row["microseconds"]) == ours
        assert all(t > 0 for t in row["microseconds"].values())
    assert rows[0]["bytes"]["torch"] == 256 * 512 * 2
    assert rows[0]["bytes"]["int-group W4 g128"] < 0.3 * rows[0]["bytes"]["torch"]
    assert measured["linear"]["absent"] == {"absent": "ImportError: no such library"}


def test_decoding(measured: dict[str, Any]) -> None:
    speeds = measured["decoding"]["tokens_per_second"]["tiny"]
    assert list(speeds) == ["torch", "int-group W4 g128"]
    assert all(s > 0 for s in speeds.values())


def test_operations_have_two_ways(measured: dict[str, Any]) -> None:
    """On CPU, where Triton's own are told to be absent; `operations_triton_interpreted_test.py` runs those."""
    found = measured["operations"]
    rows = {(r["operation"], r["tokens"]): r["microseconds"] for r in found["rows"]}
    assert set(rows) == {(o.name, count) for o in operations.OPERATIONS for count in (1, 5)}
    assert all(min(times.values()) > 0 for times in rows.values())
    assert set(found["absent"]) == {"tokens to int8: one pass", "Hadamard transform: butterflies"}
    assert all(len(t) == 2 for (name, _), t in rows.items() if name not in ("tokens to int8", "Hadamard transform"))
    text = tables.figures([measured])
    times = rows["8 experts of W4 g128, 2 a token", 5]
    gain = times["every expert on every token"] / times["one launch a matrix"]
    assert "| every expert on every token over one launch a matrix |" in text
    assert f"{gain:.2f} |" in text


def test_what_there_is_no_time_for_is_listed() -> None:
    late = linear.measure(CPU, EARLY, shapes=[(16, 16)], tokens=[1], contenders=CONTENDERS[:1])
    assert late["rows"] == []
    assert late["left_out"] == [{"shape": [16, 16]}]
    late = decoding.measure(CPU, EARLY, CONTENDERS[:1], shapes={"tiny": decoding.TINY})
    assert late["left_out"] == [{"model": "tiny", "contender": "torch"}]
    late = operations.measure(CPU, EARLY, operations=operations.OPERATIONS[:1])
    assert late["left_out"] == [{"operation": operations.OPERATIONS[0].name}]


def test_tables_come_from_the_json(measured: dict[str, Any]) -> None:
    text = tables.put("above\n<!-- x -->\nold\n<!-- /x -->\nbelow", "x", tables.figures([measured]))
    assert "old" not in text
    assert text.startswith("above\n")
    assert text.endswith("\nbelow")
    times = measured["linear"]["rows"][0]["microseconds"]
    assert f"| {times['torch'] / times['int8-act W8A8']:.2f} |" in text
    assert "absent (ImportError" in text
    assert tables.figures([]) == "On GPUs: not measured."


@pytest.mark.parametrize(("folder", "marks"), [(2, ["memory", "gpu"]), (1, ["figures", "cpu-amx", "cpu", "cpu-avx2"])])
def test_readmes_have_the_figures_of_the_results(folder: int, marks: list[str]) -> None:
    text = (Path(__file__).parents[folder] / "README.md").read_text()
    assert all(f"<!-- {mark} -->" in text for mark in marks)
    assert tables.written(text) == text


def test_a_packed_model_is_as_small_as_the_project_asks() -> None:
    sizes = json.loads(tables.MEMORY.read_text())["bytes"]
    ratio = sizes["W4 g128"]["after_a_forward"] / sizes["bf16"]["after_a_forward"]
    assert ratio < 0.35
    assert f"{ratio:.2f} (W4 g128)" in tables.memory_figures(json.loads(tables.MEMORY.read_text()))


def test_every_layer_is_measured_on_cpu() -> None:
    broken = Peer("broken", 4, 8, fails), Peer("another", 8, 8, lambda W: lambda x: lambda: x @ W.bfloat16().T * 2)
    own = [p for p in PEERS if p.name.startswith("torch _weight_")]
    result = cpu.measure((64, 256), (1, 5), seconds=0, peers=[*own, *broken])
    assert list(result["peers"]) == [p.name for p in own]
    assert result["absent"] == {"broken": "ImportError: no such library", "another": "another product: error 1.00"}
    times = result["milliseconds"]
    assert all(list(row) == ["1", "5"] and min(row.values()) > 0 for row in times.values())
    assert {f"{name}: {cpu.REFERENCE}" for name in cpu.LAYERS} < set(times)
    assert {f"W{bits} g64: {cpu.RUNS}" for bits in (2, 3)} < set(times)
    ratio = times[f"W2 g64: {cpu.REFERENCE}"]["5"] / times[f"W2 g64: {cpu.RUNS}"]["5"]
    text = tables.cpu_figures(result)
    assert f"{ratio:.2f} |" in text
    ratio = times[cpu.FLOAT]["1"] / times[f"W4 g128: {cpu.RUNS}"]["1"]
    assert f"| W4 g128 | {ratio:.2f} |" in text.split("float32 product")[1]
    ratio = times[cpu.DENSE]["5"] / times["torch _weight_int8pack_mm"]["5"]
    assert f"{ratio:.2f} |" in text.split("| torch _weight_int8pack_mm | 16 |")[1].splitlines()[0]
    assert "broken (ImportError" in text


def test_who_takes_too_long_does_not_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SLOW", -1.0)
    own = [p for p in PEERS if p.name == "torch _weight_int8pack_mm"]
    found, absent = cpu.present(own, torch.randn(64, 256))
    assert not found
    assert absent[own[0].name] == "takes 0.0 s for 8 tokens"


def test_contenders_take_turns() -> None:
    order: list[str] = []
    interleaved({name: [lambda name=name: order.append(name)] for name in "abc"}, CPU, 0)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abcbcacababcbca"


def test_red_tests_are_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path)])
    monkeypatch.setattr(run, "red", lambda *_: "1 failed")
    assert run.main() == 1
    assert "1 failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_green_tests_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path)])
    monkeypatch.setattr(run, "red", lambda *_: None)
    monkeypatch.setattr(run, "benchmarks", lambda *_: measured)
    assert run.main() == 0
    assert json.loads((tmp_path / "a-test.json").read_text()) == measured


def test_the_test_run_tells_red_from_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "find_spec", lambda _: None)  # in one process: what is looked at is the verdict
    (tmp_path / "kernels").mkdir()
    (tmp_path / "hf_quant").mkdir()
    (tmp_path / "hf_quant" / "every_format_test.py").touch()
    test = tmp_path / "kernels" / "test_it.py"
    test.write_text("def test_it(): assert True")
    assert run.red(300, "not gpu") is None
    test.write_text("def test_it(): assert False")
    assert "not green" in (run.red(300, "not gpu") or "")


def test_what_is_measured_is_compiled_before() -> None:
    found = warm.jobs([(64, 256), (128, 256)], linear.TOKENS)
    assert {name for name, _, _ in found} == {c.name for c in CONTENDERS if c.name.split()[0] not in OTHERS}
    assert not any("NF4" in name and min(counts) > 4 for name, _, counts in found), "it is measured up to 4 tokens"
    warm.run(("int-group W4 g128", (64, 256), (1, 5)), "cpu")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main() == 2
    assert "no GPU" in capsys.readouterr().err
