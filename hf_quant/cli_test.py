"""The command line: help that teaches, one clear line for an error, the exit codes, JSON for machines."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer

from hf_quant import cli
from hf_quant.cli import options
from hf_quant.cli.explain import _spans
from hf_quant.cli.methods import describe
from hf_quant.cli.output import size
from hf_quant.measure import leaderboard as board
from hf_quant.method import list_methods
from hf_quant.recipe import Recipe

COMMANDS = (
    "quantize",
    "finetune",
    "evaluate",
    "inspect",
    "explain",
    "methods",
    "estimate",
    "dequantize",
    "card",
    "leaderboard",
    "doctor",
    "tune",
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-quant", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"hf-quant {command}" in out.split("Examples")[1], "an example of the command itself"
    assert "--json" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_first_help_names_every_command(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"│ {c}" in out for c in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        ["quantise"],
        ["quantize"],
        ["quantize", "model"],
        ["quantize", "model", "out", "--bits", "four"],
        ["estimate", "model", "--no-such-option"],
        ["estimate", "model", "--set", "damp"],
        ["estimate", "model", "--set", "=1"],
        ["estimate", "model", "--override", "*.down_proj"],
        ["estimate", "model", "--override", "*.down_proj=bits"],
    ],
)
def test_a_command_line_that_cannot_be_read_exits_2(run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert "Usage" in err
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimate", "no-such-folder"], "no folder no-such-folder"),
        (["estimate", "x", "--method", "gptqq"], "did you mean 'gptq'"),
        (["estimate", "x", "--method", "gptq", "--set", "dump=1"], "no argument 'dump', did you mean 'damp'"),
        (["estimate", "x", "--bits", "99"], "bits"),
        (["estimate", "x", "--group-size", "0"], "group_size=0"),
        (["quantize", "no-such-folder", "out"], "no folder no-such-folder"),
        (["inspect", "no-such-folder"], "no folder"),
        (["explain", "no-such-folder"], "no folder"),
        (["tune", "no-such-folder"], "no folder"),
        (["dequantize", "no-such-folder", "out"], "no folder"),
        (["evaluate", "no-such-folder", "x.txt"], "no folder"),
        (["card", "no-such-folder"], "no folder"),
        (["doctor", "no-such-folder", "x.txt"], "no folder"),
        (["methods", "gptqq"], "did you mean 'gptq'"),
    ],
)
def test_our_errors_are_one_line_and_exit_1(run, words: list[str], message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    code, out, err = run(*words, "--json")
    assert code == 1
    assert message in json.loads(out)["error"]["message"]
    assert os.listdir(tmp_path) == [], "nothing is left behind"


def test_methods_prints_the_registry(run) -> None:
    code, out, _ = run("methods")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:] if line[:1].strip()}
    for method in list_methods():
        assert method.id in rows
        assert (method.paper.arxiv or "-") in rows[method.id]
    assert out.splitlines()[0].split() == ["id", "paper", "domains", "stages", "bits"]


def test_methods_as_json_is_what_the_recipes_say(run) -> None:
    found = {row["id"]: row for row in json.loads(run("methods", "--json")[1])}
    assert sorted(found) == [m.id for m in list_methods()]
    assert found["gptq"]["stages"][-2:] == ["LayerMse", "Gptq"]
    assert found["rtn"]["stages"] == []
    assert found["gptq"]["bits"] == "W4A16 g128"
    assert found["gptq"]["url"] == "https://arxiv.org/abs/2210.17323"
    one = json.loads(run("methods", "rtn", "--json")[1])
    assert one == found["rtn"]
    for method in list_methods():
        built = method.build()
        if isinstance(built, Recipe):
            assert describe(method)["bits"].startswith(f"W{built.weights.grid.bits:g}A")


def test_settings_become_values() -> None:
    config = options.make_config(
        "gptq",
        settings=["damp=0.05", "act_order=True", "symmetric=false"],
        overrides=["*.a=bits=8,group_size=64", "*.b=keep"],
        skip=["x"],
    )
    assert config.arguments == {"damp": 0.05, "act_order": True, "symmetric": False}
    assert config.overrides == {"*.a": {"bits": 8, "group_size": 64}, "*.b": None}
    assert config.skip == ("x",)
    with pytest.raises(typer.BadParameter):
        options.make_config("gptq", overrides=["=bits=8"])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (10_400_000, "10.4 MB"), (3e9, "3.0 GB"), (5e13, "50.0 TB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_an_interruption_is_said_to_be_one(run, monkeypatch: pytest.MonkeyPatch, tiny_lm_path: Path) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_quant.method.list_methods", interrupted)
    code, out, err = run("methods")
    assert (code, out) == (130, "")
    assert err.startswith("interrupted")


def test_spans_of_tokens_for_people() -> None:
    assert _spans(((1, "a"), (2, "b"), (64, "c"), (None, "d"))) == [
        ("1", "a"),
        ("2", "b"),
        ("3 to 64", "c"),
        ("65 and more", "d"),
    ]
    assert _spans(((None, "a"),)) == [("1 and more", "a")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_tuning_without_a_gpu_says_so(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hf_quant"}}))
    code, _, err = run("tune", tmp_path)
    assert code == 1
    assert "there is no cuda here" in err


def test_a_leaderboard_names_the_command_that_gives_it_again(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = board.Row(
        method="rtn", asked=4, bits=4.1, kl=0.1, kl_error=0.0, top1=9.0, seconds=1.0, peak_bytes=1, bytes_on_disk=1
    )
    contests: list[board.Contest] = []

    def measured(contest: board.Contest, *_: object) -> list[board.Row]:
        contests.append(contest)
        return [row]

    monkeypatch.setattr(board, "run", measured)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    given = ["model", "ids.npy", "out", "-b", "4", "-m", "rtn"]
    for more in ((), ("--tokens", 4096, "--seed", 2), ("-g", 64, "--window", 128, "-c", "calib.npy")):
        assert run("leaderboard", *given, *more)[0] == 0
        command = json.loads((tmp_path / "out" / "leaderboard.json").read_text())["command"]
        assert run(*shlex.split(command)[1:])[0] == 0
        assert contests[-1] == contests[-2], command
