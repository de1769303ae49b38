"""A pipeline that draws from texts, whole: both networks quantized, calibrated, saved, adapted."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import hf_quant
from hf_quant import QuantConfig
from hf_quant.diffusion.loading_pipeline import load_pipeline
from hf_quant.errors import CheckpointError, ConfigError, NotSupported
from hf_quant.runtime.packed import Packed

RTN = QuantConfig("rtn", bits=4, group_size=16)
TIMED = QuantConfig("tdq", calibration_steps=4, ranges=4, samples=8, iterations=3)
PROMPTS = ["a red cube", "two dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of random weights."""
    path = tmp_path_factory.mktemp("texts")
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(words))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    ends = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"], "pad_token_id": 0}
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=32,
        **ends,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(16,))
    StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(path / "full")
    return path / "full"


def load(path: Path, **given: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(path, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **given: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    asked = {"num_inference_steps": 3, "guidance_scale": 5.0, "generator": noise, "output_type": "np", **given}
    return torch.as_tensor(pipeline("a red cube", **asked).images)


def packed(module: torch.nn.Module) -> int:
    return sum(isinstance(m, Packed) for m in module.modules())


@pytest.fixture(scope="module")
def timed(folder: Path) -> Any:
    """Its U-Net has input ranges for each of four timesteps."""
    pipeline = load(folder)
    hf_quant.quantize(pipeline, TIMED, prompts=PROMPTS, guidance=5.0, pictures=0, progress=False)
    return pipeline


def test_both_networks_while_loading(folder: Path, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"unet": RTN, "text_encoder": RTN})
    pipeline = load(folder, quantization_config=config)
    assert packed(pipeline.unet)
    assert packed(pipeline.text_encoder)
    assert not packed(pipeline.vae)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(load(tmp_path)), draw(pipeline))
    full = draw(load(folder))
    assert 0 < float((draw(pipeline) - full).abs().mean()) < 0.2


def test_both_networks_calibrated_on_prompts(folder: Path, tmp_path: Path) -> None:
    """The text encoder on the prompts' tokens, the U-Net on both branches of the guidance."""
    pipeline = load(folder)
    configs = {"text_encoder": QuantConfig("int8-default"), "unet": TIMED}
    reports = hf_quant.quantize(pipeline, configs, prompts=PROMPTS, guidance=5.0, pictures=2, progress=False)
    assert reports["unet"].calibration["samples"] == 16  # 8 points, each with and without the prompt
    assert packed(pipeline.text_encoder)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "pictures.png").exists()
    assert torch.equal(draw(load(tmp_path)), draw(pipeline))


def test_prompts_are_asked_for(folder: Path) -> None:
    pipeline = load(folder)
    with pytest.raises(ConfigError, match="prompts"):
        hf_quant.quantize(pipeline, TIMED, progress=False)
    assert not packed(pipeline.unet)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_lora_on_a_base_with_tables(timed: Any, folder: Path, tmp_path: Path) -> None:
    trained, pipeline = copy.deepcopy(timed.unet), load(folder)
    trained.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(trained))
    pipeline.unet = copy.deepcopy(timed.unet)
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path, adapter_name="one")
    assert not torch.equal(draw(pipeline), plain)
    pipeline.set_adapters(["one"], [0.0])
    assert torch.equal(draw(pipeline), plain)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_lora_is_fused_and_taken_out_to_the_bit(folder: Path, tmp_path: Path) -> None:
    """Rounded to nearest, twice, the base would be another afterwards."""
    pipeline = load(folder)
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    trained = copy.deepcopy(pipeline.unet)
    trained.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(trained))
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path, adapter_name="one")
    adapted = draw(pipeline)
    pipeline.fuse_lora(lora_scale=1.0)
    fused = draw(pipeline)
    assert float((fused - adapted).norm()) < float((plain - adapted).norm())
    pipeline.unfuse_lora()
    assert torch.equal(draw(pipeline), adapted)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), plain)
    pipeline.load_lora_weights(tmp_path, adapter_name="one")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), fused)
    pipeline.save_pretrained(tmp_path / "fused")
    assert torch.equal(draw(load(tmp_path / "fused")), fused)


def test_a_pipeline_with_a_lora_at_work_is_not_saved_as_one_that_does_not_load(folder: Path, tmp_path: Path) -> None:
    pipeline = load(folder)
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(NotSupported, match=r"attn1.to_q holds an adapter.*unload_lora_weights"):
        pipeline.save_pretrained(tmp_path)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(load(tmp_path)), draw(pipeline))


@pytest.mark.parametrize("key", ["qweight", "bias"])
def test_what_a_file_without_a_seal_lacks_is_an_error(folder: Path, tmp_path: Path, key: str) -> None:
    """Diffusers warns, and the layer would compute with whatever was in memory."""
    pipeline = load(folder)
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    pipeline.unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].pop("sealed", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in sorted(tensors) if name.endswith(f"to_out.0.{key}"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{lost} is not in the checkpoint"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_what_is_measured_is_all_of_one_type(folder: Path, tmp_path: Path) -> None:
    """Left alone, text encoders would be of the type of their files, and the rest float32."""
    pipeline = load(folder, dtype=torch.bfloat16)
    hf_quant.quantize(pipeline, RTN, pictures=0, progress=False)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert {loaded.unet.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {torch.float32}
    assert draw(loaded).isfinite().all()


def test_a_missing_table_is_an_error(timed: Any, tmp_path: Path) -> None:
    """Never a silent default: not in the config, not in the file."""
    timed.unet.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())

    def without(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return {k: without(v, name) for k, v in node.items() if k != name}
        return [without(v, name) for v in node] if isinstance(node, list) else node

    assert "steps" in json.dumps(text["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(without(text, "steps")))
    with pytest.raises(CheckpointError):
        UNet2DConditionModel.from_pretrained(tmp_path)
