"""ZeroQ: the statistic loss of its synthetic images, and that nothing else is needed to quantize."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError
from hf_quant.plugins.allocation.zeroq import Distilled, distance, is_norm, moments, remembered


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = ViTForImageClassification(config).eval()
    for norm in filter(is_norm, model.modules()):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("given", [False, True], ids=["remembered", "of data"])
def test_the_statistic_loss_falls_more_than_tenfold(claims, given: bool) -> None:  # type: ignore[no-untyped-def]
    model = vit()
    norms = [m for m in model.modules() if is_norm(m)]
    noise = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(
        torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=16, mode="bilinear"
    )
    data = [{"pixel_values": 2 * smooth + 1}] if given else None
    ((images,),) = [tuple(b.values()) for b in Distilled().sample(data, None, 0, model)]
    with torch.no_grad():
        targets = moments(model, norms, data[0]["pixel_values"]) if data else remembered(norms, noise)
        before, after = (float(distance(moments(model, norms, x), targets)) for x in (noise, images))
    claims.invariant(
        "zeroq",
        f"the statistic loss falls more than tenfold (targets {'of data' if given else 'remembered by the norms'})",
        after < before / 10,
        {"noise": before, "distilled": after},
    )
    assert all(p.requires_grad for p in model.parameters())


def test_no_data_is_needed() -> None:
    models = [vit(), vit()]
    for model in models:
        report = hf_quant.quantize(model, QuantConfig("zeroq", bits=3, steps=10), progress=False)
    assert report.bits_per_weight < 4.1
    assert report.calibration["samples"] == 32
    noise = torch.randn(2, 3, 16, 16)
    assert models[0](noise).logits.equal(models[1](noise).logits)


def test_a_model_that_takes_no_images_is_told_so() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(CalibrationError, match="takes no images"):
        hf_quant.quantize(LlamaForCausalLM(config), QuantConfig("zeroq"), progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_for_a_model_of_half_precision(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    norms = [m for m in model.modules() if is_norm(m)]
    noise = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ((images,),) = [tuple(b.values()) for b in Distilled(steps=60).sample(None, None, 0, model)]
    assert images.dtype == dtype
    with torch.no_grad():
        targets = remembered(norms, noise)
        before, after = (float(distance(moments(model, norms, x), targets)) for x in (noise, images))
    assert after < before / 2
