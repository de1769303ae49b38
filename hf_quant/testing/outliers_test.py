"""Outliers are injected where they should be, and the model still computes the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_quant.errors import UnsupportedModel
from hf_quant.testing import inject_outliers


@torch.no_grad()
def test_outliers_change_the_inputs_and_not_the_function(tiny_lm_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    ids = torch.arange(48).reshape(2, 24) * 37 % 2048
    peaks: dict[str, float] = {}

    def watch(name: str) -> None:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args: peaks.__setitem__(name, float(args[0].abs().max())))

    names = [f"model.layers.{i}.{leaf}" for i in (0, 5) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    for name in names:
        watch(name)
    before, calm = model(ids).logits, dict(peaks)
    channels = inject_outliers(model, {"input_ids": ids})
    assert len(channels) == 4  # 1.5 % of 256
    assert (model(ids).logits - before).abs().max() < 1e-4
    assert all(peaks[n] > 4 * calm[n] for n in names)
    gains = model.model.layers[3].input_layernorm.weight
    assert gains[channels].abs().mean() > 10 * gains.abs().median()


def test_a_model_without_a_norm_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(UnsupportedModel, match="Bare has no norm"):
        inject_outliers(Bare(), {"x": torch.ones(1, 8)})
