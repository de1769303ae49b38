"""Bad input: each kind is one clear error of ours, from Python and from the command line, and leaves nothing behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import hf_quant
import hf_quant.cli
from hf_quant import QuantConfig
from hf_quant.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    HfQuantError,
    RunError,
    UnsupportedModel,
)
from hf_quant.loading import load_model
from hf_quant.testing.subjects import SUBJECTS

ROOT = Path(__file__).parents[1]
IDS = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))


def tiny_llama(hidden: int = 64, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small float model on disk."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def saved(tmp_path: Path, model: Path) -> Path:
    """The same, quantized."""
    quantized(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def quantized(path: Path, method: str = "rtn", **arguments: object) -> PreTrainedModel:
    config = QuantConfig(method, **{"bits": 4, "group_size": 32, **arguments})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def cli(*words: object) -> tuple[int, str]:
    """Run the command line here: (exit code, its last line on stderr)."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as err, redirect_stdout(StringIO()):
        patch.setattr(sys, "argv", ["hf-quant", *map(str, words)])
        patch.setattr(hf_quant.cli, "_quiet", lambda: None)
        with pytest.raises(SystemExit) as end:
            hf_quant.cli.main()
    return int(end.value.code or 0), (err.getvalue().strip().splitlines() or [""])[-1]


def process(*words: object, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from hf_quant.cli import main; main()", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for it: (exit code, stderr), which for an error is one line."""
    err = run.communicate(timeout=300)[1].strip()
    assert run.returncode == 0 or len(err.splitlines()) == 1, err
    return run.returncode, err


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the model that goes in ------------------------------------------------------------------------------------------


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load_model(tmp_path / "nope")
    with pytest.raises(CheckpointError, match="no folder"):
        hf_quant.estimate(tmp_path / "nope", QuantConfig("rtn"))
    code, line = cli("quantize", tmp_path / "nope", tmp_path / "out")
    assert (code, line[:6]) == (1, "error:")
    assert os.listdir(tmp_path) == []


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        hf_quant.estimate(tmp_path / "photos", QuantConfig("rtn"))
    with pytest.raises(ConfigError, match="QuantConfig"):
        hf_quant.quantize(tiny_llama(), "rtn")  # type: ignore[arg-type]
    with pytest.raises(HfQuantError):
        hf_quant.quantize("a string", QuantConfig("rtn"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="nothing to quantize"):
        hf_quant.quantize(torch.nn.Sequential(torch.nn.LayerNorm(8)), QuantConfig("rtn"))


@pytest.mark.parametrize("keep", [100, -1])
def test_truncated_weights(model: Path, saved: Path, keep: int) -> None:
    for folder in (model, saved):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|no safetensors)"):
            load_model(folder)
        with pytest.raises(Exception, match=r"(?i)header|incomplete|truncated|metadata"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_bit_flips_in_every_tensor_of_a_quantized_model(saved: Path) -> None:
    whole = load_file(saved / "model.safetensors")
    for name, tensor in whole.items():
        bad = tensor.clone()
        raw = bad.reshape(-1).view(torch.uint8)
        raw[len(raw) // 2] ^= 1
        with_metadata = safetensors_metadata(saved / "model.safetensors")
        save_file({**whole, name: bad}, saved / "model.safetensors", metadata=with_metadata)
        with pytest.raises(CheckpointError, match=r"model\.safetensors|" + name.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(saved)


def safetensors_metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_a_model_that_another_library_quantized(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"another library.*'gptq'"):
        load_model(model, QuantConfig("rtn"))
    for words in (["quantize", model, tmp_path / "out"], ["explain", model], ["dequantize", model, tmp_path / "out"]):
        code, line = cli(*words)
        assert code == 1
        assert "'gptq'" in line


def test_a_model_that_is_quantized_already(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="already"):
        load_model(saved, QuantConfig("rtn"))
    with pytest.raises(UnsupportedModel, match="already"):
        hf_quant.quantize(AutoModelForCausalLM.from_pretrained(saved), QuantConfig("rtn"))
    assert cli("quantize", saved, tmp_path / "out")[0] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "model.layers.0.input_layernorm"]
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_no_numbers(tmp_path: Path, method: str, name: str, value: float) -> None:
    model = tiny_llama()
    model.get_submodule(name).weight.data.view(-1)[3] = value
    with pytest.raises(UnsupportedModel, match=f"{name}.* NaN or infinite"):
        hf_quant.quantize(model, QuantConfig(method, calibration=IDS))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=f"{name}.* NaN or infinite"):
        quantized(tmp_path / "model", method, calibration=IDS)


# ---- a checkpoint of ours that this version cannot read ----------------------------------------------------------


def test_an_unknown_format_and_newer_versions(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    ours = config["quantization_config"]

    def refuses(changed: dict[str, object], message: str) -> None:
        (saved / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(saved)

    refuses(ours | {"version": 99}, "newer")
    text = json.dumps(ours)
    assert '"int-group/1"' in text
    refuses(json.loads(text.replace('"int-group/1"', '"int-group/9"')), "is not the one saved with these weights")
    file = saved / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # as if it had been saved so, without checksums
    text = json.dumps({**ours, "sealed": None})
    refuses(json.loads(text.replace('"int-group/1"', '"int-group/9"')), "int-group/9")
    refuses(json.loads(text.replace('"int-group/1"', '"no-such/1"')), "no-such/1")


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs calibration data"),
        ([], "empty"),
        ([""], "too short"),
        (["too short"], "too short"),
        (torch.zeros(0, 16, dtype=torch.int64), "shape"),
        (torch.rand(4, 16), "integers"),
        ("no/such/file.txt", "no such calibration file"),
        (np.array([[-1, 2, 3]]), "negative id"),
    ],
)
def test_calibration_data_that_cannot_be_used(tiny_lm_path: Path, data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantized(tiny_lm_path, "gptq", calibration=data)


def test_calibration_from_the_command_line(tiny_lm_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    code, line = cli("quantize", tiny_lm_path, tmp_path / "out", "-m", "gptq", "-c", tmp_path / "empty.txt")
    assert code == 1
    assert "too short" in line
    code, line = cli("quantize", tiny_lm_path, tmp_path / "out", "-m", "gptq")
    assert code == 1
    assert "needs calibration data" in line
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_the_wrong_tokenizer(model: Path, tiny_lm_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_path)
    with pytest.raises(CalibrationError, match=r"vocabulary of 64.*tokenizer"):
        quantized(model, "gptq", calibration=["some words of no importance. " * 4000], processor=tokenizer)
    with pytest.raises(CalibrationError, match="tokenizer"):
        quantized(model, "gptq", calibration=["some words"])  # there is none beside the model
    with pytest.raises(CalibrationError, match="vocabulary of 64"):
        hf_quant.quantize(tiny_llama(), QuantConfig("gptq"), data=IDS + 60)


def test_an_expert_that_no_token_reaches() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=1))
    with torch.no_grad():  # expert 2 scores lowest for every token: all else is positive
        router = next(p for n, p in model.named_parameters() if p.shape == (4, 32))
        router.copy_(torch.zeros(4, 32))
        router[0] = 1.0
        router[1] = -1.0
    with pytest.raises(CalibrationError, match=r"no calibration token ever reached .*experts\.\d.*allow"):
        hf_quant.quantize(model, QuantConfig("gptq", group_size=32), data=IDS)
    report = hf_quant.quantize(model, QuantConfig("gptq", group_size=32, allow=["*experts*"]), data=IDS)
    assert any("calibration" in e.reason for e in report.quantized), "the report says which were rounded to nearest"


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])  # statistics for the solver; for the transform alone
def test_a_vision_tower_without_images(method: str) -> None:
    subject = SUBJECTS["vlm"]
    text = [{"input_ids": batch["input_ids"][:, 16:]} for batch in subject.data()]
    model = subject.model()
    with pytest.raises(CalibrationError, match=r"batches with images.*allow=\[\"model\.vision_tower\.\*\""):
        hf_quant.quantize(model, QuantConfig(method), data=text)
    allowed = ["model.vision_tower.*", "model.multi_modal_projector.*"]
    hf_quant.quantize(model, QuantConfig(method, allow=allowed), data=text, progress=False)
    plain = {"model.vision_tower.*": {"method": "rtn"}, "model.multi_modal_projector.*": {"method": "rtn"}}
    hf_quant.quantize(subject.model(), QuantConfig(method, overrides=plain), data=text, progress=False)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 99}, "bits"),
        ({"bits": 4.5}, "bits"),
        ({"bits": "four"}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": 2.5}, "group_size=2.5"),
        ({"grup_size": 4}, "did you mean 'group_size'"),
        ({"seed": "x"}, "seed"),
        ({"skip": [3]}, "skip"),
        ({"overrides": {"*": {"bits": 77}}}, "bits"),
        ({"overrides": {"*": {"no": 1}}}, "no argument 'no'"),
        ({"version": 99}, "newer"),
        ({"quant_method": "gptq"}, "another library"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(HfQuantError, match=message):
        QuantConfig("rtn", **arguments)


def test_patterns_that_match_nothing() -> None:
    for name in ("skip", "overrides"):
        value = {"*.down_pro": {"bits": 8}} if name == "overrides" else ["*.down_pro"]
        with pytest.raises(ConfigError, match=r"down_pro.* matches no layer"):
            hf_quant.quantize(tiny_llama(), QuantConfig("rtn", **{name: value}))


def test_a_ragged_last_group_works_and_what_cannot_hold_it_says_so(tmp_path: Path) -> None:
    """K = 64 and 128 in groups of 48."""
    model = tiny_llama()
    tokens = IDS[:2]
    hf_quant.quantize(model, QuantConfig("rtn", bits=4, group_size=48))
    model.save_pretrained(tmp_path / "ragged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ragged")
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


# ---- where it goes ---------------------------------------------------------------------------------------------------


def test_output_that_is_not_empty_or_cannot_be_written(model: Path, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    file.write_text("")
    for out, message in (
        (full, "not empty"),
        (file, "is a file"),
        (file / "out", "cannot write"),
        ("/proc/out", "cannot write"),
    ):
        code, line = cli("quantize", model, out, "-g", 32)
        assert code == 1
        assert message in line
    assert (full / "thesis.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "model"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that even root cannot write to."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode and os.geteuid() == 0:
        pytest.skip("root without the right to mount: nothing is read-only here")
    folder.chmod(0o555) if mounted.returncode else None
    yield folder
    if not mounted.returncode:
        subprocess.run(["umount", folder], check=True)


def test_output_on_a_read_only_disk(model: Path, read_only: Path) -> None:
    code, line = cli("quantize", model, read_only / "out", "-g", 32)
    assert code == 1
    assert "cannot write to" in line
    with pytest.raises(RunError, match="cannot write to"):
        hf_quant.quantize(tiny_llama(), QuantConfig("gptq", group_size=32, run_dir=read_only / "run"), data=IDS)


def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    """A limit on the size of a file, at which the kernel fails writes as it does when the disk is full."""
    np.save(tmp_path / "ids.npy", IDS.numpy())
    out = tmp_path / "out"
    words = ["quantize", model, out, "-m", "gptq", "-g", 32, "-c", tmp_path / "ids.npy"]

    def limit(size: int) -> Callable[[], None]:
        def apply() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return apply

    code, line = ended(process(*words, limit=limit(20_000)))  # no block fits
    assert code == 1
    assert "cannot write" in line
    assert sorted(os.listdir(tmp_path)) == ["ids.npy", "model"], "nothing half-written"
    code, line = ended(process(*words, limit=limit(60_000)))  # every block fits, the model does not
    assert code == 1
    assert "cannot write" in line
    assert not out.exists()
    assert len(list((tmp_path / "out.partial").glob("*.run/*.safetensors"))) == 2
    assert not list((tmp_path / "out.partial").glob("*/config.json"))
    assert cli(*words)[0] == 0, "the same command goes on"
    assert sorted(os.listdir(tmp_path)) == ["ids.npy", "model", "out"]
    load_model(out)


def test_two_runs_at_once(model: Path, tmp_path: Path) -> None:
    """The second refuses and does not disturb the first."""
    np.save(tmp_path / "ids.npy", IDS.numpy())
    words = ["quantize", model, tmp_path / "out", "-m", "gptq", "-g", 32, "-c", tmp_path / "ids.npy"]
    first = process(*words)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out.partial" / ".lock").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None, "the first run ended before the second began"
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # so it is still running when the second comes
        code, line = cli(*words)
        assert code == 1
        assert "another run is writing" in line
    finally:
        first.send_signal(signal.SIGCONT)
        assert ended(first) == (0, "")
    load_model(tmp_path / "out")


def test_one_run_directory_serves_one_run(tmp_path: Path) -> None:
    from hf_quant.running.locks import hold

    (tmp_path / "run").mkdir()
    config = QuantConfig("gptq", group_size=32, run_dir=tmp_path / "run")
    with hold(tmp_path / "run"), pytest.raises(RunError, match="another run"):
        hf_quant.quantize(tiny_llama(), config, data=IDS)
    hf_quant.quantize(tiny_llama(), config, data=IDS)
    with pytest.raises(RunError, match="another job"):
        hf_quant.quantize(tiny_llama(seed=1), config, data=IDS)


def test_a_damaged_config_does_not_size_a_model(saved: Path) -> None:
    edit(saved / "config.json", num_hidden_layers=10**8)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match="is not the one saved with these weights"):
            load(saved)


# ---- the loader under fire -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_load_the_same_model_or_none(tmp_path: Path, each: int) -> None:
    """Half of them in each of two processes; what kills a process is a failure too."""
    for name, seed, bits in (("model", 0, 4), ("sibling", 1, 3)):
        tiny = tiny_llama(hidden=32, layers=1, seed=seed)
        hf_quant.quantize(tiny, QuantConfig("rtn", bits=bits, group_size=16))
        tiny.save_pretrained(tmp_path / name, max_shard_size="12KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "integration_tests.loader_fuzz", tmp_path / "model", str(a), str(a + each)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for a in (0, 1000)
    ]
    cases: dict[int, dict[str, str]] = {}
    for run in runs:
        out, err = run.communicate()
        for line in out.splitlines():
            found = json.loads(line)
            cases.setdefault(found["case"], {}).update(found)
        assert run.returncode == 0, f"the process died: {out.splitlines()[-1:]} {err[-2000:]}"
    wrong = [c for c in cases.values() if c["verdict"].startswith("WRONG")]
    assert not wrong, (
        "\n".join(f"{c['case']} {c['damage']}: {c['verdict']}" for c in wrong[:20]) + f"\n{len(wrong)} in all"
    )
    assert len(cases) == 2 * each
    refused = sum(c["verdict"].startswith("refused") for c in cases.values())
    assert refused > 0.85 * len(cases), (
        f"only {refused} of {len(cases)} were noticed; harmless ones, such as shards that change names, are few"
    )
