"""Adapters on a quantized denoiser: PEFT trains one on a DiT in 3 bits, and it comes back from its folder."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import ConfigError, UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PEFT
DIT = Path(__file__).parents[1] / "examples" / "models" / "digits-dit" / "transformer"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def denoiser(bits: int | None) -> nn.Module:
    model: nn.Module = DiTTransformer2DModel.from_pretrained(DIT)
    if bits is not None:
        hf_quant.quantize(model, QuantConfig("rtn", bits=bits, group_size=64), progress=False)
    return model


def noise(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(8, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (8,), generator=generator),
        "class_labels": torch.randint(0, 10, (8,), generator=generator),
    }


def test_an_adapter_on_a_quantized_dit(tmp_path: Path) -> None:
    """A few steps against full precision: the error falls on noise not seen; saved, and loaded back."""
    original, generator = denoiser(None).eval(), torch.Generator().manual_seed(0)
    held = noise(generator)
    torch.manual_seed(0)
    base = hf_quant.prepare_for_training(denoiser(3), gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) < 0.1 * sum(p.numel() for p in original.parameters())

    def error(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = original(**batch).sample
        return (model(**batch).sample - wanted).square().mean()

    with torch.no_grad():
        before = float(error(held))
    optimizer = torch.optim.AdamW(learned, lr=2e-3)
    for _ in range(15):
        optimizer.zero_grad()
        error(noise(generator)).backward()
        optimizer.step()
    with torch.no_grad():
        after, said = float(error(held)), model(**held).sample
        assert after < 0.8 * before
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(denoiser(3), tmp_path).eval()
        assert torch.equal(again(**held).sample, said)
    with pytest.raises(UnsupportedModel, match=r"base of 3 bits .*has 4 bits"):
        PeftModel.from_pretrained(denoiser(4), tmp_path)
    with pytest.raises(ConfigError, match=r"r=129 is above the rank of the \[128, 128\] matrix"):
        get_peft_model(denoiser(4), LoraConfig(r=129, target_modules=["to_q"]))
