"""The temporal part is found in U-Nets and transformers, and computes by itself what the network computes."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hf_quant.diffusion.temporal import TemporalBlock, temporal_block
from hf_quant.diffusion.timesteps_test import STEPS, batches, dit, unet


def sites(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def data(model: nn.Module) -> list[dict[str, Tensor]]:
    if not isinstance(model, UNet2DConditionModel):
        return batches(model)
    generator = torch.Generator().manual_seed(0)
    drawn = {"sample": torch.randn(2, 1, 8, 8, generator=generator)}
    drawn["encoder_hidden_states"] = torch.randn(2, 3, 16, generator=generator)
    return [{**drawn, "timestep": torch.tensor([t, t])} for t in (900, 100)]


def expected(model: nn.Module) -> set[str]:
    """By the names that diffusers gives them, which the code under test does not know."""
    names = {n for n in sites(model) if "time_emb" in n or "timestep_embedder" in n or n.endswith("norm1.linear")}
    return names | {n for n in sites(model) if n == "proj_out_1"}


@pytest.mark.parametrize("make", [dit, unet, conditional])
def test_found_and_computed(make: Any) -> None:
    model = make()
    made = data(model)
    block = temporal_block(model, sites(model), made[0])
    assert block is not None
    assert set(block.sites) == expected(model)
    ends = [n for n in block.sites if "timestep_embedder" not in n and "time_embedding" not in n]
    for batch in made:
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(n).register_forward_hook(lambda _, a, out, n=n, seen=seen: seen.__setitem__(n, out))
            for n in ends
        ]
        with torch.no_grad():
            model(**batch)
            given = {n: v for n, v in batch.items() if n in ("timestep", "class_labels")}
            alone = block(**given)
        for handle in handles:
            handle.remove()
        assert torch.equal(alone, torch.cat([seen[n] for n in ends], 1))


def test_every_combination_once() -> None:
    model = dit()
    block = temporal_block(model, sites(model), batches(model)[0])
    assert isinstance(block, TemporalBlock)
    calls = block.conditions([*batches(model), *batches(model)])
    rows = torch.cat([torch.stack([c["timestep"], c["class_labels"]], 1) for c in calls])
    assert rows.tolist() == [[t, c] for t in STEPS for c in (1, 3)]
    assert all(len(c["timestep"]) == 2 for c in calls)


def test_gradients_reach_the_temporal_layers_alone() -> None:
    model = unet()
    block = temporal_block(model, sites(model), batches(model)[0])
    assert block is not None
    block(timestep=torch.tensor([5, 900])).sum().backward()
    reached = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.grad is not None and "weight" in n}
    assert reached == set(block.sites)


def test_nothing_temporal() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.inner(sample * timestep[:, None])
            return out

    batch = {"sample": torch.ones(2, 3), "timestep": torch.tensor([1, 2])}
    assert temporal_block(Mixed(), ["inner"], batch) is None
    assert temporal_block(Mixed(), ["inner"], {"sample": batch["sample"]}) is None
