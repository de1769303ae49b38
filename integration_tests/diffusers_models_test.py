"""Small random models of the families in diffusers: packed, calibrated, saved, adapted, offloaded, cast."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet3DConditionModel,
    WanTransformer3DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import NotSupported, UnsupportedModel
from hf_quant.runtime.linear import QuantLinear

CONFIG = QuantConfig("rtn", bits=4, group_size=16)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
PATCHES = {"patch_size": 2, "in_channels": 4, "sample_size": 8}
MODELS: dict[str, tuple[type[ModelMixin], dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "pixart": (
        PixArtTransformer2DModel,
        {
            **HEADS,
            **PATCHES,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "use_additional_conditions": False,
        },
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 6, 32)},
    ),
    "sd3": (
        SD3Transformer2DModel,
        {
            **HEADS,
            **PATCHES,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
        },
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 6, 32), "pooled_projections": (1, 32)},
    ),
    "flux": (
        FluxTransformer2DModel,
        {
            **HEADS,
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        {
            "hidden_states": (1, 16, 16),
            "encoder_hidden_states": (1, 6, 32),
            "pooled_projections": (1, 32),
            "img_ids": (16, 3),
            "txt_ids": (6, 3),
        },
    ),
    "wan": (
        WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "patch_size": (1, 2, 2),
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 6, 32)},
    ),
    "unet3d": (
        UNet3DConditionModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        {"sample": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 4, 16)},
    ),
}


def inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {key: torch.randn(shape, generator=generator) for key, shape in MODELS[name][2].items()}
    return {**made, "timestep": torch.tensor([5 + 300 * seed])}


@torch.no_grad()
def output(model: nn.Module, name: str = "flux") -> torch.Tensor:
    out: torch.Tensor = model(**inputs(name)).sample
    return out


def floats(model: nn.Module) -> list[str]:
    """Layers that were left as they are."""
    return [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model in full precision, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, (kind, sizes, _) in MODELS.items():
        torch.manual_seed(0)
        kind(**sizes).save_pretrained(folder / name)
    return folder


@pytest.fixture
def flux(folders: Path) -> nn.Module:
    model: nn.Module = FluxTransformer2DModel.from_pretrained(folders / "flux", quantization_config=CONFIG)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_packed_while_loading_and_saved(folders: Path, tmp_path: Path, name: str) -> None:
    """All but what reads the input and what writes the output, convolutions in two and three dimensions included."""
    kind = MODELS[name][0]
    whole = kind.from_pretrained(folders / name)
    model = kind.from_pretrained(folders / name, quantization_config=CONFIG)
    inside = ("patch_embedding", "pos_embed.proj", "conv_in")
    assert set(floats(model)) <= {*inside, "proj_out", "conv_out"}
    error = (output(model, name) - output(whole, name)).norm() / output(whole, name).norm()
    assert 0 < float(error) < 0.2
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert torch.equal(output(again, name), output(model, name))
    again.dequantize()
    torch.testing.assert_close(output(again, name), output(model, name), atol=1e-4, rtol=1e-4)
    assert floats(again) == floats(whole)


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_in_memory(folders: Path, tmp_path: Path, name: str) -> None:
    """Blocks that hand on two streams, or None in the place of one, are run like any other."""
    kind = MODELS[name][0]
    model = kind.from_pretrained(folders / name)
    whole = output(model, name)
    batches = [inputs(name, seed) for seed in range(3)]
    hf_quant.quantize(model, QuantConfig("gptq", bits=4, group_size=16), data=batches, progress=False)
    assert 0 < float((output(model, name) - whole).norm() / whole.norm()) < 0.2
    model.save_pretrained(tmp_path)
    assert torch.equal(output(kind.from_pretrained(tmp_path), name), output(model, name))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT, whenever there is a second adapter
def test_loras_of_a_pipeline(flux: nn.Module, tmp_path: Path) -> None:
    """Flux pipelines look for dense weights in the state dict, also when a LoRA is there already."""
    plain, base = output(flux), copy.deepcopy(flux)
    targets = ["to_q", "to_k", "x_embedder"]
    flux.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    adapted = output(flux)
    assert not torch.equal(adapted, plain)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(flux))
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=base, **others)
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipeline.set_adapters(["one"])
    assert torch.equal(output(base), adapted)
    pipeline.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(output(base), plain)
    pipeline.unload_lora_weights()
    assert torch.equal(output(base), plain)
    assert not [key for key in base.state_dict() if key.endswith("to_q.weight")]


def test_a_lora_is_merged_and_taken_out_again(flux: nn.Module) -> None:
    plain = output(flux)
    flux.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = output(flux)
    hf_quant.merge_adapter(flux)
    assert 0 < float((output(flux) - adapted).norm() / adapted.norm()) < 0.01
    hf_quant.unmerge_adapter(flux)
    flux.disable_adapters()
    assert torch.equal(output(flux), plain)


def test_a_single_file(folders: Path, tmp_path: Path) -> None:
    file = folders / "flux" / "diffusion_pytorch_model.safetensors"
    model = FluxTransformer2DModel.from_single_file(str(file), config=str(folders / "flux"), quantization_config=CONFIG)
    want = output(FluxTransformer2DModel.from_pretrained(folders / "flux", quantization_config=CONFIG))
    assert torch.equal(output(model), want)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(FluxTransformer2DModel.from_pretrained(tmp_path)), want)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_packed_single_file_is_refused(folders: Path, tmp_path: Path, name: str) -> None:
    """Diffusers renames its tensors as an original checkpoint's: an IndexError, or layers without data."""
    kind = MODELS[name][0]
    kind.from_pretrained(folders / name, quantization_config=CONFIG).save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    for config in (tmp_path, folders / name):
        for given in ({}, {"quantization_config": CONFIG}):
            with pytest.raises(NotSupported, match=r"holds packed layers.*from_pretrained"):
                kind.from_single_file(file, config=str(config), **given)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "disk"])
def test_group_offload(flux: nn.Module, tmp_path: Path, kind: str) -> None:
    want, here = output(flux), torch.device("cpu")
    how: dict[str, Any] = {"offload_type": kind, "num_blocks_per_group": 1}
    if kind == "disk":
        how = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    flux.enable_group_offload(onload_device=here, offload_device=here, **how)
    assert torch.equal(output(flux), want)


def test_convolutions_offloaded_to_disk(folders: Path, tmp_path: Path) -> None:
    """What stands in for one and the matrix in it would each have a file, the second of emptied tensors."""
    model, here = UNet3DConditionModel.from_pretrained(folders / "unet3d"), torch.device("cpu")
    config = QuantConfig("int8-default")  # rounded inputs: the matrix itself runs
    hf_quant.quantize(model, config, data=[inputs("unet3d", seed) for seed in range(2)], progress=False)
    want = output(model, "unet3d")
    model.enable_group_offload(
        onload_device=here, offload_device=here, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    held = [t for file in tmp_path.glob("*.safetensors") for t in load_file(file).values()]
    assert len(held) == len(list(model.parameters()))
    assert torch.equal(output(model, "unet3d"), want)
    assert torch.equal(output(model, "unet3d"), want)


@pytest.mark.parametrize("kind", ["offload", "cast"])
def test_weights_that_are_elsewhere_are_refused(folders: Path, kind: str) -> None:
    """Before any work: hooks that fetch them pass our layers by."""
    model, here = FluxTransformer2DModel.from_pretrained(folders / "flux"), torch.device("cpu")
    if kind == "offload":
        model.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    else:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match="quantize it first"):
        hf_quant.quantize(model, CONFIG)


def test_layerwise_casting_leaves_packed_layers_alone(flux: nn.Module) -> None:
    want = output(flux)
    flux.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    packed = {n for n, m in flux.named_modules() if isinstance(m, QuantLinear)}
    cast = {n.rpartition(".")[0] for n, p in flux.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert not packed & cast
    assert torch.equal(output(flux), want)


def test_layerwise_casting_leaves_packed_convolutions_alone(folders: Path) -> None:
    """What stands in for one is a convolution to diffusers, and its bias would be stored in 8 bits."""
    model = UNet3DConditionModel.from_pretrained(folders / "unet3d", quantization_config=CONFIG)
    plain = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            assert module.bias.dtype == torch.float32
    for name in floats(plain):  # these diffusers may store so
        module = plain.get_submodule(name)
        if next(model.get_submodule(name).parameters()).dtype == torch.float8_e4m3fn:
            module.to(torch.float8_e4m3fn).to(torch.float32)
    assert torch.equal(output(model, "unet3d"), output(plain, "unet3d"))


def test_a_pipeline_offloads_its_models(flux: nn.Module) -> None:
    from accelerate import cpu_offload_with_hook

    want = output(flux)
    offloaded, hook = cpu_offload_with_hook(flux, "cpu")  # what `enable_model_cpu_offload` puts on every component
    assert torch.equal(output(offloaded), want)
    hook.offload()
    assert torch.equal(output(offloaded), want)


def test_compiled(flux: nn.Module) -> None:
    want = output(flux)
    compiled = torch.compile(flux, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled), want, atol=1e-5, rtol=1e-5)
