"""Pipelines evaluated: the figures are those of a plain loop, on the trained digits and on tiny networks."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import hf_quant
from hf_quant import QuantConfig
from hf_quant.cli.app import app
from hf_quant.cli.evaluate_pipeline import classifier_beside, rows
from hf_quant.diffusion.drawing_test import noise, small_dit, unet_pipeline
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.errors import CheckpointError, ConfigError, HfQuantError, RunError, UnsupportedModel
from hf_quant.measure.evaluate_pipeline import evaluate_pipeline
from hf_quant.measure.evaluation import PipelineEvaluation
from hf_quant.testing.bench import EXAMPLES

UNET, VIT = EXAMPLES / "models" / "digits-unet", EXAMPLES / "models" / "digits-vit"
SMALL: dict[str, Any] = {"images": 3, "steps": 2, "batch_size": 2, "progress": False}


def rounded(pipeline: Any, bits: int = 4) -> Any:
    hf_quant.quantize(pipeline.unet, QuantConfig("rtn", bits=bits, group_size=-1, allow=("*",)), progress=False)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pipeline in full precision, and quantized."""
    folder = tmp_path_factory.mktemp("pipelines")
    unet_pipeline().save_pretrained(folder / "full")
    shutil.copytree(folder / "full", folder / "four")
    shutil.rmtree(folder / "four" / "unet")
    rounded(unet_pipeline()).unet.save_pretrained(folder / "four" / "unet")
    return folder / "full", folder / "four"


def test_the_figures_are_those_of_a_plain_loop() -> None:
    full, ours = unet_pipeline(), rounded(unet_pipeline())
    found = evaluate_pipeline(ours, full, **SMALL)
    x_full = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in noise(0, 1, 2)])
    x_ours, scheduler = x_full.clone(), full.scheduler
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            assert found.trajectory[i] == pytest.approx(float((x_ours - x_full).square().mean()), rel=1e-3)
            e, e_q = full.unet(x_full, t).sample, ours.unet(x_full, t).sample
            ratio = 10 * (e.square().sum() / (e - e_q).square().sum()).log10()
            assert found.sqnr[i] == pytest.approx(float(ratio), rel=1e-3)
            x_full = scheduler.step(e, t, x_full).prev_sample
            x_ours = scheduler.step(ours.unet(x_ours, t).sample, t, x_ours).prev_sample
    difference = ((x_full / 2 + 0.5).clamp(0, 1) - (x_ours / 2 + 0.5).clamp(0, 1)).square().mean((1, 2, 3))
    assert found.picture_mse == pytest.approx(float(difference.mean()), rel=1e-3)
    assert found.psnr == pytest.approx(float((-10 * difference.log10()).mean()), rel=1e-3)
    assert found.timesteps == (500.0, 0.0)
    assert found.peak_holds == "the pipeline and the reference"
    assert found.bits_per_weight == pytest.approx(hf_quant.true_bits(ours.unet))
    assert found.seconds_per_image > 0
    assert found.reference_seconds_per_image is not None
    assert PipelineEvaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_batches_change_nothing_but_time() -> None:
    full, ours = unet_pipeline(), rounded(unet_pipeline())
    one, two = (evaluate_pipeline(ours, full, **{**SMALL, "batch_size": b}) for b in (1, 3))
    assert one.picture_mse == pytest.approx(two.picture_mse, rel=1e-3)
    assert one.sqnr == pytest.approx(two.sqnr, rel=1e-3)


def test_folders(saved: tuple[Path, Path]) -> None:
    full, four = saved
    found = evaluate_pipeline(four, full, **SMALL)
    again = evaluate_pipeline(four / "unet", full, **SMALL)  # the network alone is put into the reference
    assert found.sqnr == again.sqnr
    assert found.picture_mse == again.picture_mse
    assert found.bytes_on_disk == again.bytes_on_disk == sum(p.stat().st_size for p in four.rglob("*.safetensors"))
    assert found.stored_bytes < found.bytes_on_disk
    assert found.peak_holds == "the pipeline"
    alone = evaluate_pipeline(full, **SMALL)
    assert alone.bits_per_weight is alone.sqnr is alone.psnr is alone.reference_seconds_per_image is None


def test_trained_digits_are_read_and_two_bits_hurt() -> None:
    full = load_pipeline(UNET)
    eight, two = (rounded(load_pipeline(UNET), bits) for bits in (8, 2))
    options: dict[str, Any] = {"classifier": VIT, "images": 4, "steps": 6, "progress": False}
    good, bad = (evaluate_pipeline(p, full, **options) for p in (eight, two))
    assert min(good.sqnr) > max(bad.sqnr) + 10
    assert good.psnr > bad.psnr + 10
    assert good.agreement == 100
    assert good.frechet_to_reference < 0.1 * bad.frechet_to_reference
    assert good.classifier == "digits-vit"
    assert good.accuracy is None  # it draws no classes


def test_pipelines_by_class() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = DiTPipeline(small_dit(), vae, DDIMScheduler())
    assert pipeline.transformer.training, "else labels are never dropped"
    options: dict[str, Any] = {"images": 4, "steps": 2, "guidance": 1.0, "progress": False}
    with pytest.raises(ConfigError, match="class_labels=range"):
        evaluate_pipeline(pipeline, **options)
    vit = ViTForImageClassification.from_pretrained(VIT, dtype=torch.float32)
    data = torch.rand(3, 8, 8, 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="the reference itself"):
        evaluate_pipeline(pipeline, pipeline, classifier=vit, **options)
    found = evaluate_pipeline(copy.deepcopy(pipeline), pipeline, data, classifier=vit, **options)
    assert found.accuracy == found.reference_accuracy
    assert found.agreement == 100
    assert found.frechet_to_data == found.reference_frechet_to_data > 1
    assert found.frechet_to_reference == pytest.approx(0, abs=1e-3)
    assert found.psnr == 200
    assert pipeline.transformer.training
    assert found.data == 3


class Stop(Exception):
    """A killed run."""


def quality(found: PipelineEvaluation) -> dict[str, Any]:
    times = ("seconds", "seconds_per_image", "reference_seconds_per_image", "peak_bytes")
    return {name: value for name, value in found.to_json().items() if name not in times}


def test_a_killed_measurement_goes_on(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_quant.measure import batch_log
    from hf_quant.measure import evaluate_pipeline as module

    full, four = saved
    log = tmp_path / "log"
    asked: dict[str, Any] = {**SMALL, "images": 5, "classifier": VIT, "data": torch.rand(3, 8, 8, 1)}
    whole = evaluate_pipeline(four, full, **asked)

    def once(log: Path, batch: dict[str, Any]) -> None:
        batch_log.append(log, batch)
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(module, "append", once)
        with pytest.raises(Stop):
            evaluate_pipeline(four, full, resume=log, **asked)
    assert len(log.read_bytes().splitlines()) == 2  # the key and a batch
    with log.open("ab") as file:
        file.write(b'{"ours": {"sec')  # a second batch, cut off
    drawn = []
    counted = module._draw
    monkeypatch.setattr(module, "_draw", lambda *args: (drawn.append(args[2]), counted(*args))[1])
    assert quality(evaluate_pipeline(four, full, resume=log, **asked)) == quality(whole)
    assert drawn == [range(2, 4), range(2, 4), range(4, 5), range(4, 5)]
    for other in ({"seed": 3}, {"steps": 3}, {"reference": four}, {"classifier": None, "data": None}):
        with pytest.raises(RunError, match="another evaluation"):
            evaluate_pipeline(**{"model": four, "reference": full, "resume": log, **asked, **other})


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_any_type(saved: tuple[Path, Path], tmp_path: Path, kind: torch.dtype) -> None:
    """Files of any type compute in float32 unless asked; half a precision costs what it costs."""
    full, four = saved
    whole = load_pipeline(full)
    whole.to(kind).save_pretrained(tmp_path / "half")
    half = rounded(load_pipeline(full, dtype=kind))
    half.save_pretrained(tmp_path / "half-four")
    stored = evaluate_pipeline(tmp_path / "half-four", full, **SMALL)
    assert stored.dtype == "float32"
    usual = evaluate_pipeline(four, full, **SMALL)
    assert stored.psnr == pytest.approx(usual.psnr, abs=1.5)
    computed = evaluate_pipeline(tmp_path / "half-four", full, dtype=kind, **SMALL)
    assert computed.dtype == str(kind).removeprefix("torch.")
    assert computed.psnr == pytest.approx(usual.psnr, abs=3)
    mixed = evaluate_pipeline(load_pipeline(tmp_path / "half", dtype=kind), load_pipeline(full), **SMALL)
    assert min(mixed.sqnr) > 25


def test_the_classifier_beside_a_pipeline(tmp_path: Path) -> None:
    assert classifier_beside(str(UNET)) == VIT.resolve()
    assert classifier_beside(str(tmp_path), "someone/on-the-hub", None) is None
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    (tmp_path / "pipeline").mkdir()
    assert classifier_beside(str(tmp_path / "pipeline")) is None, "which of the two?"


def test_refusals(saved: tuple[Path, Path], tmp_path: Path) -> None:
    full, four = saved
    wrong: list[tuple[type[HfQuantError], str, dict[str, Any]]] = [
        (CheckpointError, "there is no folder", {"model": tmp_path / "no"}),
        (UnsupportedModel, r"holds no config\.json", {"model": tmp_path, "reference": full}),
        (UnsupportedModel, "not a pipeline", {"model": full, "reference": EXAMPLES / "models" / "tiny-lm"}),
        (UnsupportedModel, "does not fit", {"model": EXAMPLES / "models" / "tiny-lm", "reference": full}),
        (ConfigError, "the pipeline it belongs to", {"model": four / "unet"}),
        (ConfigError, "1 or more", {"model": full, "images": 0}),
        (ConfigError, "name one", {"model": full, "data": torch.zeros(2, 8, 8, 1)}),
        (ConfigError, "takes no prompts", {"model": full, "prompts": ["a cube"]}),
        (UnsupportedModel, "no pipeline of diffusers", {"model": full, "reference": 7}),
    ]
    for kind, message, arguments in wrong:
        with pytest.raises(kind, match=message):
            evaluate_pipeline(**{**SMALL, **arguments})
    shutil.copytree(full, tmp_path / "cut")
    weights = next((tmp_path / "cut" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        evaluate_pipeline(tmp_path / "cut", **SMALL)


def test_a_reference_that_runs_otherwise_is_refused() -> None:
    other = unet_pipeline()
    slower = DDIMPipeline(other.unet, DDIMScheduler())
    torch.manual_seed(0)
    wide = unet_pipeline()
    wide.unet.register_to_config(sample_size=16)
    with pytest.raises(UnsupportedModel, match="another pipeline"):
        evaluate_pipeline(slower, wide, **SMALL)


def test_command(saved: tuple[Path, Path], tmp_path: Path) -> None:
    full, four = saved
    words = ["evaluate", str(four), "--reference", str(full), "--images", "2", "--steps", "2"]
    run = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "error.png"), "--json"], catch_exceptions=False)
    assert run.exit_code == 0
    found = PipelineEvaluation.from_json(json.loads(run.stdout))
    assert found.command == "hf-quant evaluate four --reference full --images 2 --steps 2"
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")
    people = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert f"{found.psnr:.2f} dB" in people
    assert "seconds per image" in people
    assert "Fréchet distance to full precision's" in dict(rows(found))  # its line may be the only one of the two
    log = ["--resume", str(tmp_path / "log"), "--json"]
    once, twice = (CliRunner().invoke(app, [*words, *log], catch_exceptions=False) for _ in range(2))
    assert once.stdout == twice.stdout, "nothing was left to draw"
    for more, message in (
        (["--dtype", "int8"], "bfloat16 or float16"),
        (["--prompts", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
    language = ["evaluate", str(EXAMPLES / "models" / "tiny-lm")]
    with pytest.raises(ConfigError, match="--images"):
        CliRunner().invoke(app, [*language, "x.txt", "--images", "3"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="what to measure on"):
        CliRunner().invoke(app, language, catch_exceptions=False)
