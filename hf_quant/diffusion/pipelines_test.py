"""Pipelines quantized whole: calibrated on their own trajectories, saved, loaded without an import of ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PipelineQuantizationConfig,
)

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.pipelines import is_pipeline
from hf_quant.diffusion.timesteps_test import unet
from hf_quant.errors import CalibrationError, ConfigError, NotSupported, UnsupportedModel
from hf_quant.runtime.packed import Packed

RTN = QuantConfig("rtn", bits=4, group_size=32)
INT8 = QuantConfig("int8-default")


def dit_pipeline() -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(16,))
    return quiet(DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler()))


def unet_pipeline() -> Any:
    return quiet(DDIMPipeline(unet(), DDIMScheduler()))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **given: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipeline(num_inference_steps=3, generator=generator, output_type="np", **given).images)


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(m, Packed) for m in module.modules())


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()
    )


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
images = pipeline(class_labels=[1, 2], num_inference_steps=3, generator=generator, output_type="np").images
torch.save(torch.as_tensor(images), sys.argv[2])
"""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' schedulers
@pytest.mark.parametrize("other", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_schedulers_can_be_changed(other: Any) -> None:
    """Before calibration as after it."""
    pipeline = dit_pipeline()
    pipeline.scheduler = other.from_config(pipeline.scheduler.config)
    hf_quant.quantize(pipeline, INT8, class_labels=[1], pictures=0, progress=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert draw(pipeline, class_labels=[2]).isfinite().all()


def test_a_conditional_pipeline_from_calibration_to_another_process(tmp_path: Path) -> None:
    pipeline = dit_pipeline()
    before = draw(pipeline, class_labels=[1, 2])
    reports = hf_quant.quantize(pipeline, INT8, class_labels=range(10), guidance=2.0, pictures=2, progress=False)
    assert list(reports) == ["transformer"]
    assert packed(pipeline.transformer)
    assert not packed(pipeline.vae)
    calibration = reports["transformer"].calibration
    assert calibration["source"] == "DiTPipeline's own trajectories (DDIMScheduler, 20 steps, guidance 2)"
    assert calibration["samples"] == 512  # 256 points, each with both branches of the guidance
    after = draw(pipeline, class_labels=[1, 2])
    assert 0 < float((after - before).abs().mean()) < 0.05
    folder = tmp_path / "small-dit"
    pipeline.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    for part in ("library_name: diffusers", "pictures.png", "int8-default", "DiTPipeline's own trajectories", "dB on"):
        assert part in text
    assert (folder / "pictures.png").stat().st_size > 1000
    assert json.loads((folder / "report-transformer.json").read_text())["method"]["method"] == "int8-default"
    out = tmp_path / "drawn.pt"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", LOAD, str(folder), str(out)], check=True)
    assert torch.equal(torch.load(out), after)


def test_an_unconditional_one_and_a_mapping(tmp_path: Path) -> None:
    pipeline = unet_pipeline()
    reports = hf_quant.quantize(
        pipeline, {"unet": QuantConfig("gptq", bits=4, group_size=32)}, pictures=0, progress=False
    )
    assert packed(pipeline.unet)
    assert reports["unet"].bits_per_weight < 6
    pipeline.save_pretrained(tmp_path)
    assert "pictures.png" not in (tmp_path / "README.md").read_text()
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(draw(again, batch_size=2), draw(pipeline, batch_size=2))


def test_a_card_that_a_person_wrote_stays(tmp_path: Path) -> None:
    pipeline = unet_pipeline()
    hf_quant.quantize(pipeline, RTN, pictures=1, progress=False)
    (tmp_path / "README.md").write_text("mine")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    plain = unet_pipeline()
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_a_pipeline_that_was_loaded_keeps_its_card(tmp_path: Path) -> None:
    """Saved again: pictures and reports too, under the new name; together with what is quantized since."""
    pipeline = dit_pipeline()
    hf_quant.quantize(pipeline, RTN, class_labels=[1], pictures=1, progress=False)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    pipeline.save_pretrained(first)
    again = quiet(DiffusionPipeline.from_pretrained(first))
    again.save_pretrained(second)
    assert (second / "README.md").read_text() == (first / "README.md").read_text().replace("first", "second")
    for name in ("pictures.png", "report-transformer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    hf_quant.quantize(again, {"vae": QuantConfig("rtn", bits=8)}, pictures=0, progress=False)
    again.save_pretrained(third)
    text = (third / "README.md").read_text()
    assert "### transformer" in text
    assert "### vae" in text
    assert "pictures.png" not in text
    hf_quant.dequantize(again)
    again.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    again.save_pretrained(second)  # in the place of the quantized one, of which nothing is told any more
    assert not [path.name for path in second.iterdir() if path.suffix in (".md", ".png") or "report" in path.name]


def test_the_card_names_the_type_that_loading_has_to_name(tmp_path: Path) -> None:
    pipeline = unet_pipeline().to(torch.bfloat16)
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    pipeline.save_pretrained(tmp_path / "half")
    assert 'from_pretrained("half", dtype=torch.bfloat16)  # a DDIM' in (tmp_path / "half/README.md").read_text()


def test_pickles_carry_no_seal(tmp_path: Path) -> None:
    pipeline = unet_pipeline()
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    with pytest.raises(NotSupported, match="safetensors only"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)


def test_what_takes_a_model_takes_a_pipeline(tmp_path: Path) -> None:
    pipeline = dit_pipeline()
    with pytest.raises(UnsupportedModel, match="no component"):
        hf_quant.dequantize(pipeline)
    hf_quant.quantize(pipeline, {"transformer": RTN, "vae": QuantConfig("rtn", bits=8)}, progress=False)
    rows = hf_quant.explain(pipeline)
    assert len(rows) == packed(pipeline.transformer) + packed(pipeline.vae)
    assert rows[0].name == f"transformer.{hf_quant.explain(pipeline.transformer)[0].name}"
    assert hf_quant.true_bits(pipeline.transformer) < hf_quant.true_bits(pipeline) < hf_quant.true_bits(pipeline.vae)
    with pytest.raises(UnsupportedModel, match="one of transformer, vae"):
        hf_quant.estimate(pipeline, RTN)
    before = draw(pipeline, class_labels=[4])
    assert hf_quant.dequantize(pipeline) is pipeline
    assert not packed(pipeline.transformer) + packed(pipeline.vae)
    torch.testing.assert_close(draw(pipeline, class_labels=[4]), before, atol=1e-4, rtol=1e-4)


def test_trajectories_have_the_steps_that_are_asked_for() -> None:
    """A pipeline that draws in four steps is calibrated on those, whatever the method says."""
    pipeline, seen = dit_pipeline(), set[float]()
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.update(given["timestep"].tolist()), with_kwargs=True
    )
    config = QuantConfig("tdq", calibration_steps=8, ranges=4, samples=8, iterations=1)
    reports = hf_quant.quantize(pipeline, config, class_labels=[1], steps=4, pictures=0, progress=False)
    assert "(DDIMScheduler, 4 steps)" in reports["transformer"].calibration["source"]
    assert len(seen) == 4
    with pytest.raises(ConfigError, match="steps"):
        hf_quant.quantize(unet_pipeline().unet, INT8, data=[], steps=4)


def test_several_components_one_folder_to_resume_from(tmp_path: Path) -> None:
    pipeline = dit_pipeline()
    config = QuantConfig("rtn", bits=4, group_size=32, run_dir=tmp_path)
    both = PipelineQuantizationConfig(quant_mapping={"transformer": config, "vae": config})
    hf_quant.quantize(pipeline, both, progress=False)
    assert packed(pipeline.transformer)
    assert packed(pipeline.vae)


def test_a_push_has_the_card_in_place_of_the_generic_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = unet_pipeline()
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    seen = []
    module = "diffusers.utils.hub_utils"
    monkeypatch.setattr(f"{module}.create_repo", lambda repo, **_: type("Repo", (), {"repo_id": repo}))
    monkeypatch.setattr(
        f"{module}.upload_folder", lambda folder_path, **_: seen.append((Path(folder_path) / "README.md").read_text())
    )
    pipeline.push_to_hub("someone/small-unet")
    assert 'from_pretrained("someone/small-unet")' in seen[0]


def test_a_method_without_data_needs_no_conditions(tmp_path: Path) -> None:
    pipeline = dit_pipeline()
    hf_quant.quantize(pipeline, {"transformer": RTN, "vae": QuantConfig("rtn", bits=8)}, progress=False)
    assert packed(pipeline.transformer)
    assert packed(pipeline.vae)
    pipeline.save_pretrained(tmp_path)
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(draw(again, class_labels=[4]), draw(pipeline, class_labels=[4]))


def test_refusals_before_any_work() -> None:
    pipeline = dit_pipeline()
    for config, given, kind, message in (
        ({"transfomer": RTN}, {}, ConfigError, "did you mean 'transformer'"),
        ({"scheduler": RTN}, {}, ConfigError, "no network 'scheduler'"),
        ({"transformer": "rtn"}, {}, ConfigError, "transformer: a QuantConfig, not str"),
        ("rtn", {}, ConfigError, "component: QuantConfig}, not str"),
        (INT8, {}, ConfigError, "draws from classes"),
        (INT8, {"class_labels": [1], "arguments": {"hight": 3}}, ConfigError, "takes no hight"),
        (INT8, {"prompts": ["a dog"]}, ConfigError, "takes no prompts|draws from classes"),
        (INT8, {"data": []}, ConfigError, "its own calibration data"),
    ):
        with pytest.raises(kind, match=message):
            hf_quant.quantize(pipeline, config, progress=False, **given)
    with pytest.raises(CalibrationError, match="never calls its vae"):  # before the transformer, which it does call
        hf_quant.quantize(pipeline, {"transformer": INT8, "vae": INT8}, class_labels=[1], progress=False)
    assert not packed(pipeline.transformer)
    with pytest.raises(ConfigError, match="pictures=-1"):
        hf_quant.quantize(pipeline, RTN, class_labels=[1], pictures=-1)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    with pytest.raises(UnsupportedModel, match=r"what torch\.compile made"):
        hf_quant.quantize(pipeline, RTN)
    unet = unet_pipeline()
    with pytest.raises(ConfigError, match="takes no classes"):
        hf_quant.quantize(unet, INT8, class_labels=[1])
    with pytest.raises(ConfigError, match="are a pipeline's"):
        hf_quant.quantize(unet.unet, INT8, prompts=["a"])
    for scheduler, message in ((None, "no scheduler"), (object(), "object, which sets no timesteps")):
        unet.scheduler = scheduler
        with pytest.raises(UnsupportedModel, match=message):
            hf_quant.quantize(unet, INT8)
    with pytest.raises(ConfigError, match="4 samples are too few for 20 steps"):
        QuantConfig("tdq", samples=4)
    few = {"sample": torch.zeros(2, 1, 8, 8), "timestep": torch.tensor([1, 2])}
    with pytest.raises(CalibrationError, match="2 timesteps, too few for 20"):
        hf_quant.quantize(unet.unet, QuantConfig("tdq"), data=[few], progress=False)
    assert not packed(unet.unet)
    hf_quant.quantize(unet, RTN, progress=False)
    with pytest.raises(UnsupportedModel, match="quantized already"):
        hf_quant.quantize(unet, RTN)
    assert is_pipeline(unet)
    assert not is_pipeline(unet.unet)
    assert not is_pipeline(DDIMPipeline)


def test_loading_whole_pipelines(tmp_path: Path) -> None:
    """`PipelineQuantizationConfig` by mapping and by backend gives the same weights."""
    dit_pipeline().save_pretrained(tmp_path)
    one = PipelineQuantizationConfig(quant_mapping={"transformer": RTN})
    every = PipelineQuantizationConfig(
        quant_backend="hf_quant",
        quant_kwargs={"method": "rtn", "bits": 4, "group_size": 32},
        components_to_quantize=["transformer"],
    )
    loaded = [DiffusionPipeline.from_pretrained(tmp_path, quantization_config=c) for c in (one, every)]
    memory = dit_pipeline()
    hf_quant.quantize(memory, RTN, pictures=0, progress=False)
    for pipeline in loaded:
        assert same_weights(pipeline.transformer, memory.transformer)
        assert not packed(pipeline.vae)
    loaded[0].save_pretrained(tmp_path / "again")
    assert '`QuantConfig("rtn", bits=4' in (tmp_path / "again" / "README.md").read_text()
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert same_weights(again.transformer, memory.transformer)


def test_configs_that_cannot_be_meant_are_refused_before_loading(tmp_path: Path) -> None:
    """Where diffusers speaks of its own class, or only warns and leaves the component in full precision."""
    dit_pipeline().save_pretrained(tmp_path)
    for component, text in (
        ("transfomer", "did you mean 'transformer'"),
        ("unet", "no network 'unet'"),
        ("scheduler", "no network 'scheduler'.* it has: transformer, vae"),
    ):
        for config in (
            PipelineQuantizationConfig(quant_mapping={component: RTN}),
            PipelineQuantizationConfig(
                quant_backend="hf_quant", quant_kwargs={"method": "rtn"}, components_to_quantize=[component]
            ),
        ):
            with pytest.raises(ConfigError, match=text):
                DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    ready = dit_pipeline().transformer
    with pytest.raises(ConfigError, match="transformer is given ready-made"):
        DiffusionPipeline.from_pretrained(
            tmp_path,
            transformer=ready,
            quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": RTN}),
        )
    for kind in (DiffusionPipeline, DiTPipeline):
        with pytest.raises(ConfigError, match=r"PipelineQuantizationConfig\(quant_mapping=.*hf_quant\.quantize"):
            kind.from_pretrained(tmp_path, quantization_config=RTN)
    with pytest.raises((OSError, ValueError), match="nowhere"):  # diffusers' own, for what is not there
        DiffusionPipeline.from_pretrained(
            str(tmp_path / "nowhere"), quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": RTN})
        )
