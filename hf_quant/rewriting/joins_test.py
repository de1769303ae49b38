"""What a concatenation put together is told apart again."""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from hf_quant.groups import find_groups
from hf_quant.rewriting.joins import with_joins
from hf_quant.runtime.apart import take_apart
from hf_quant.sites import walk


def test_the_skip_connections_of_a_unet() -> None:
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    take_apart(model)
    sites = list(walk(model))

    def run(network: nn.Module) -> Tensor:
        found: Tensor = network(torch.randn(2, 1, 8, 8), 5).sample
        return found

    groups = with_joins(find_groups(model, "", sites, run), model, "", run)
    found = {s.name: g.parts for g in groups for s in g.sites if g.parts is not None}
    found.pop("time_embedding.linear_1")  # sines and cosines: a concatenation too, outside all blocks
    assert set(found) == {
        f"up_blocks.{b}.resnets.{r}.{conv}.matrix"
        for b in (0, 1)
        for r in (0, 1)
        for conv in ("conv1", "conv_shortcut")
    }
    assert found["up_blocks.0.resnets.0.conv_shortcut.matrix"].bincount().tolist() == [16, 16]
    assert found["up_blocks.0.resnets.1.conv_shortcut.matrix"].bincount().tolist() == [16, 8]
    assert found["up_blocks.0.resnets.1.conv1.matrix"].bincount().tolist() == [9 * 16, 9 * 8]
    assert found["up_blocks.0.resnets.1.conv1.matrix"].tolist() == [0] * 144 + [1] * 72


def test_a_linear_layer_behind_a_concatenation() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm, self.out = nn.Linear(6, 4), nn.LayerNorm(6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.mix(self.norm(torch.cat([x, x[..., :2]], dim=-1))))
            return y

    model = Skip()
    sites = list(walk(model))
    run = lambda m: m(torch.randn(3, 5, 4))  # noqa: E731
    groups = with_joins(find_groups(model, "", sites, run), model, "", run)
    found = {s.name: g.parts for g in groups for s in g.sites}
    assert found["out"] is None
    assert found["mix"] is None  # only the norm is called with it: nothing says that it keeps channels in their places
