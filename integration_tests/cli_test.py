"""The command line from end to end on the trained tiny-lm: what one command writes the next one reads."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_quant import QuantConfig
from hf_quant.cli.app import app
from hf_quant.errors import HfQuantError
from hf_quant.report import Report

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "examples" / "data" / "tiny_test.npy"
TOKENS = torch.arange(96).reshape(2, 48)


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from hf_quant.cli import main; main()", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_ctrl_c,
    )


def _hear_ctrl_c() -> None:
    """A shell's background jobs ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*words: object) -> tuple[str, str]:
    """(stdout, stderr) of a command that must succeed."""
    process = start(*words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def here(*words: object) -> str:
    """What a command that must succeed prints, without a process of its own."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of what a run reads as it comes: these tests run it five times, in bfloat16, slow on some processors."""
    file = tmp_path_factory.mktemp("data") / "tiny_calib.npy"
    np.save(file, np.load(ROOT / "examples" / "data" / "tiny_calib.npy")[:32, :48])
    return file


@pytest.fixture(scope="module")
def made(
    calibration: Path, tiny_lm_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """Four bits by gptq with an eight-bit layer, measured on a little text; and what the command said."""
    folder, held_out = tmp_path_factory.mktemp("made") / "tiny-4bit", calibration.with_name("tiny_test.npy")
    np.save(held_out, np.load(HELD_OUT)[:2048])
    words = ["quantize", tiny_lm_path, folder, "-m", "gptq", "-b", 4, "-g", 64, "-c", calibration, "-e", held_out]
    out, err = run(
        *words, "--set", "damp=0.02", "--override", "*.0.mlp.down_proj=bits=8", "--skip", "*.1.*.q_proj", "--json"
    )
    assert err == ""
    return folder, json.loads(out)


def test_quantize_writes_a_model_that_is_complete(made: tuple[Path, dict[str, object]], tiny_lm_path: Path) -> None:
    folder, summary = made
    assert os.listdir(folder.parent) == [folder.name], "the work place is gone"
    report = Report.load(folder / "report.json")
    assert summary["bits_per_weight"] == report.bits_per_weight
    assert 4.3 < report.bits_per_weight < 4.7
    assert summary["measured"] == report.measured
    assert 0 < report.measured["kl"] < 0.02
    bits = {e.name: e.spec["grid"]["bits"] for e in report.quantized if e.spec}
    assert bits["model.layers.0.mlp.down_proj.weight"] == 8
    assert bits["model.layers.1.mlp.down_proj.weight"] == 4
    assert "model.layers.1.self_attn.q_proj.weight" not in bits
    assert (summary["quantized"], summary["unsupported"]) == (41, 0)
    card = (folder / "README.md").read_text()
    assert "# tiny-4bit" in card
    assert "hf-quant evaluate tiny-4bit tiny_test.npy --reference tiny-lm" in card
    for written in (card, (folder / "report.json").read_text(), (folder / "report.html").read_text()):
        assert str(folder.parent) not in written, "no path of this machine"
        assert str(ROOT) not in written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The list", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4


def test_quantize_is_from_pretrained_with_the_same_config(
    made: tuple[Path, dict[str, object]], calibration: Path, tiny_lm_path: Path
) -> None:
    config = QuantConfig(
        "gptq",
        bits=4,
        group_size=64,
        damp=0.02,
        calibration=calibration,
        overrides={"*.0.mlp.down_proj": {"bits": 8}},
        skip=["*.1.*.q_proj"],
    )
    python = AutoModelForCausalLM.from_pretrained(tiny_lm_path, quantization_config=config).state_dict()
    command = AutoModelForCausalLM.from_pretrained(made[0]).state_dict()
    assert python.keys() == command.keys()
    assert all(torch.equal(python[name], command[name]) for name in python)


def test_saving_again_gives_the_same_bytes(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """safetensors alone orders its metadata anew each time: eight equal files are no accident."""
    model = AutoModelForCausalLM.from_pretrained(made[0])
    written = {(made[0] / "model.safetensors").read_bytes()}
    for i in range(7):
        model.save_pretrained(tmp_path / str(i))
        written.add((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_what_was_estimated_is_what_was_made(made: tuple[Path, dict[str, object]], tiny_lm_path: Path) -> None:
    words = ["-m", "gptq", "-g", 64, "--override", "*.0.mlp.down_proj=bits=8", "--skip", "*.1.*.q_proj"]
    found = json.loads(here("estimate", tiny_lm_path, *words, "--json"))
    assert found["bits_per_weight"] == pytest.approx(made[1]["bits_per_weight"], rel=1e-9)
    assert found["model_bytes"] == pytest.approx(made[1]["bytes"], rel=0.02)
    assert found["needs_calibration"] is True


def test_inspect_reads_headers_only(made: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "copy"))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:header] + bytes(len(data) - header))  # no weight is there to be read
    found = json.loads(here("inspect", folder, "--json"))
    assert found["bits_per_weight"] == pytest.approx(made[1]["bits_per_weight"], rel=1e-9)
    assert found["formats"] == {"int-group/1": 41}
    assert found["made_by"]["method"] == "gptq"
    assert found["made_by"]["calibration"]["source"] == "tiny_calib.npy"
    assert found["bytes"] == len(data) - header
    shown = here("inspect", folder)
    assert all(text in shown for text in ("gptq(", "bits=4", "group_size=64", "damp=0.02"))
    assert "https://arxiv.org/abs/2210.17323" in shown


def test_explain_names_a_kernel_for_every_layer(made: tuple[Path, dict[str, object]]) -> None:
    rows = json.loads(here("explain", made[0], "--dtype", "float32", "--json"))
    assert len(rows) == 41
    assert {row["dtype"] for row in rows} == {"float32"}
    for row in rows:
        assert row["kernel"]
        assert row["kernel"] != "reference" or row["refused"], "who runs the reference is told why"
    assert "int-group/1" in here("explain", made[0])


def test_dequantize_gives_a_plain_model_with_the_same_outputs(
    made: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    here("dequantize", made[0], plain, "--dtype", "float32")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    assert not (plain / "report.json").exists()
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(plain)(TOKENS).logits
        two = AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)(TOKENS).logits
    assert torch.allclose(one, two, atol=1e-3 * float(two.abs().max()))
    assert AutoTokenizer.from_pretrained(plain)("x")["input_ids"]


def test_a_card_written_again_holds_what_was_measured_since(
    made: tuple[Path, dict[str, object]], tiny_lm_path: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "again"))
    words = ["--reference", tiny_lm_path, "--tokens", 1024, "--window", 256]
    printed = here("evaluate", folder, HELD_OUT, *words, "--json")
    (tmp_path / "quality.json").write_text(printed)
    found = json.loads(printed)
    assert (found["windows"], found["window"]) == (4, 256)
    here("card", folder, "--evaluation", tmp_path / "quality.json", "--repo", "user/name")
    card = (folder / "README.md").read_text()
    assert "user/name" in card
    assert "hf-quant evaluate again tiny_test.npy --reference tiny-lm --window 256 --tokens 1024" in card
    assert f"{found['kl']:.5f}" in card
    assert Report.load(folder / "report.json").measured == found
    (folder / "README.md").write_text("# My own words\n")
    with pytest.raises(HfQuantError, match="written by a person"):
        here("card", folder)
    assert (folder / "README.md").read_text() == "# My own words\n"


def test_a_run_that_was_stopped_twice_goes_on_to_the_same_bytes(
    made: tuple[Path, dict[str, object]], calibration: Path, tiny_lm_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / made[0].name
    words = ["quantize", tiny_lm_path, out, "-m", "gptq", "-b", 4, "-g", 64, "-c", calibration]
    words += ["--set", "damp=0.02", "--override", "*.0.mlp.down_proj=bits=8", "--skip", "*.1.*.q_proj"]
    finished: list[Path] = []
    for how, code, told in ((signal.SIGINT, 130, "interrupted; finished work is kept"), (signal.SIGKILL, -9, "")):
        process, before = start(*words), len(finished)
        deadline = time.monotonic() + 200
        while len(finished) < before + 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
            finished = list(tmp_path.rglob("*.run/*.safetensors"))
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err.startswith(told)
        assert len(err.splitlines()) == (1 if told else 0)
        assert not out.exists()
        assert not list(tmp_path.rglob("config.json")), "nothing there that loads"
    run(*words)
    one, two = (hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in (out, made[0]))
    assert one == two
    assert os.listdir(tmp_path) == [out.name]
