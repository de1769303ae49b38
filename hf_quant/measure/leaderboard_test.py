"""Rows are measured on the reloaded model, kept when finished, and the front is the front."""

import json
from pathlib import Path

import pytest

from hf_quant.errors import ConfigError, RunError
from hf_quant.measure import leaderboard as board
from hf_quant.measure.leaderboard import Contest, Row, entries, pareto, result, run, save_plot
from hf_quant.method import method_named

DATA = Path(__file__).parents[2] / "examples" / "data"


def row(name: str, bits: float, kl: float) -> Row:
    return Row(method=name, asked=None, bits=bits, kl=kl, kl_error=0.0, top1=90.0, seconds=1.0, peak_bytes=1)


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row("a", 4, 0.1), row("b", 3, 0.3), row("c", 3, 0.2), row("d", 3.5, 0.25), row("e", 5, 0.1)]
    assert [r.method for r in pareto([*rows, Row(method="x", asked=2, refused="no")])] == ["c", "a"]


def test_methods_without_bits_enter_once() -> None:
    chosen = [method_named("gptq"), method_named("bnb-nf4")]
    assert [(m.id, b) for m, b in entries(chosen, [4, 3])] == [("gptq", 4), ("gptq", 3), ("bnb-nf4", None)]
    with pytest.raises(ConfigError):
        entries(chosen, [])


def test_rows_are_measured_on_what_was_saved_and_kept(
    tiny_lm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = Contest(model=str(tiny_lm_path), held_out=DATA / "tiny_test.npy", tokens=1024)
    wanted = entries([method_named("rtn"), method_named("bnb-fp4"), method_named("gptq")], [4])
    rows = run(contest, wanted, tmp_path)
    rtn, fp4, gptq = rows
    assert rtn.bits == pytest.approx(4.1875, abs=0.05)
    assert fp4.bits == pytest.approx(4.5, abs=0.05)
    assert rtn.kl is not None
    assert 0 < rtn.kl < 0.05
    assert rtn.bytes_on_disk is not None
    assert rtn.bytes_on_disk < 0.5 * (tiny_lm_path / "model.safetensors").stat().st_size
    assert gptq.refused is not None
    assert "calibration" in gptq.refused, "it is told why there is no row"

    evaluated = []
    monkeypatch.setattr(board, "evaluate", lambda *a, **k: evaluated.append(a))
    assert run(contest, wanted, tmp_path) == rows
    assert evaluated == [], "finished rows are kept"
    with pytest.raises(RunError, match="another contest"):
        run(Contest(model=str(tiny_lm_path), held_out=DATA / "tiny_test.npy", tokens=512), wanted, tmp_path)

    found = result(contest, rows, "hf-quant leaderboard")
    assert json.loads(json.dumps(found))["pareto"]
    assert str(tiny_lm_path.parent) not in json.dumps(found), "no path of this machine"
    save_plot(rows, "tiny-lm", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
