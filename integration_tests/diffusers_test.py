"""The same QuantConfig in diffusers: quantize while loading, save, load back, dequantize, in pipelines too."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, PipelineQuantizationConfig, UNet2DConditionModel, UNet2DModel

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CheckpointError, NotSupported
from hf_quant.runtime.linear import QuantLinear

INPUTS = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([5, 700]),
    "class_labels": torch.tensor([1, 3]),
}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    path = tmp_path_factory.mktemp("dit")
    model.save_pretrained(path)
    return path


@torch.no_grad()
def output(model: DiTTransformer2DModel) -> torch.Tensor:
    return model(**INPUTS).sample


def packed(model: torch.nn.Module) -> int:
    return sum(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("method", ["rtn", "mse-clip"])
def test_quantize_on_load_save_and_load_back(dit: Path, tmp_path: Path, method: str) -> None:
    whole = DiTTransformer2DModel.from_pretrained(dit)
    model = DiTTransformer2DModel.from_pretrained(dit, quantization_config=QuantConfig(method, bits=4, group_size=32))
    assert packed(model) == sum(type(m) is torch.nn.Linear for m in whole.modules()) - 2  # all but the output head's
    assert 0 < float((output(model) - output(whole)).norm() / output(whole).norm()) < 0.5
    model.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert packed(again) == packed(model)
    assert torch.equal(output(again), output(model))
    half = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    for a, b in zip(half.modules(), model.modules(), strict=True):
        if isinstance(a, QuantLinear) and isinstance(b, QuantLinear):
            assert torch.equal(a.dequantize(torch.float32), b.dequantize(torch.float32))


def test_the_command_line_leaves_a_report_beside_a_network(dit: Path, tmp_path: Path) -> None:
    """It has no card, and what the command prints names the report."""
    from typer.testing import CliRunner

    from hf_quant.cli.app import app

    done = CliRunner().invoke(app, ["quantize", str(dit), str(tmp_path / "out"), "-m", "rtn", "-b", "4", "-g", "32"])
    assert done.exit_code == 0, done.output
    assert {"report.json", "report.html"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert packed(DiTTransformer2DModel.from_pretrained(tmp_path / "out")) > 0


def test_dequantized_models_save_as_plain_ones(dit: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(dit, quantization_config=QuantConfig("rtn", bits=8, group_size=32))
    before = output(model)
    model.dequantize()
    assert packed(model) == 0
    torch.testing.assert_close(output(model), before)
    model.save_pretrained(tmp_path)
    assert packed(DiTTransformer2DModel.from_pretrained(tmp_path)) == 0


def test_a_model_in_memory(dit: Path, tmp_path: Path) -> None:
    config = QuantConfig("rtn", bits=4, group_size=32)
    model = DiTTransformer2DModel.from_pretrained(dit)
    report = hf_quant.quantize(model, config)
    assert report.bits_per_weight == hf_quant.true_bits(model)
    assert torch.equal(output(model), output(DiTTransformer2DModel.from_pretrained(dit, quantization_config=config)))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(DiTTransformer2DModel.from_pretrained(tmp_path)), output(model))


def test_damage_is_found(dit: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(dit, quantization_config=QuantConfig("rtn", bits=4, group_size=32))
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_calibrated_methods_say_what_they_miss(dit: Path) -> None:
    with pytest.raises(NotSupported, match="calibration data"):
        DiTTransformer2DModel.from_pretrained(dit, quantization_config=QuantConfig("gptq", bits=4, group_size=32))


def test_pipeline_configs_take_it() -> None:
    one = PipelineQuantizationConfig(quant_mapping={"transformer": QuantConfig("rtn", bits=4)})
    every = PipelineQuantizationConfig(
        quant_backend="hf_quant", quant_kwargs={"method": "rtn", "bits": 4}, components_to_quantize=["transformer"]
    )
    for config in (one, every):
        resolved = config._resolve_quant_config(is_diffusers=True, module_name="transformer")
        assert resolved == QuantConfig("rtn", bits=4)


UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
}


def unets() -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """Small U-Nets with attention, and something to run them on."""
    torch.manual_seed(0)
    plain = UNet2DModel(
        **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    conditional = UNet2DConditionModel(
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([5, 700])}
    return {
        "plain": (plain.eval(), inputs),
        "conditional": (conditional.eval(), {**inputs, "encoder_hidden_states": torch.randn(2, 4, 16)}),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "conditional"])
def test_convolutions_of_a_unet_are_quantized_too(name: str, tmp_path: Path) -> None:
    """Every convolution but the first and the last, while loading as in memory; and they come back as they were."""
    model, inputs = unets()[name]
    model.save_pretrained(tmp_path / "float")
    whole, kind = model(**inputs).sample, type(model)
    convolutions = [n for n, m in model.named_modules() if type(m) is torch.nn.Conv2d]
    loaded = kind.from_pretrained(tmp_path / "float", quantization_config=QuantConfig("rtn", bits=4, group_size=32))
    left = [n for n, m in loaded.named_modules() if type(m) is torch.nn.Conv2d]
    assert left == [n for n in convolutions if n in ("conv_in", "conv_out")]
    hf_quant.quantize(model, QuantConfig("rtn", bits=4, group_size=32))
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    loaded.save_pretrained(tmp_path / "packed")
    again = kind.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(**inputs).sample, loaded(**inputs).sample)
    calibrated, _ = unets()[name]
    batches = [{**inputs, "timestep": torch.full((2,), t)} for t in (1, 500, 900)]
    for config in (QuantConfig("gptq", bits=8, group_size=32), QuantConfig("int8-default")):
        calibrated, _ = unets()[name]
        hf_quant.quantize(calibrated, config, data=batches, progress=False)
        assert 0 < float((calibrated(**inputs).sample - whole).norm() / whole.norm()) < 0.05
    hf_quant.dequantize(loaded)
    assert [n for n, m in loaded.named_modules() if type(m) is torch.nn.Conv2d] == convolutions
    assert set(loaded.state_dict()) == set(unets()[name][0].state_dict())
