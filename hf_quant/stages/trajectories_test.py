"""Calibration data from a pipeline's own trajectories."""

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, UNet2DModel
from torch import Tensor

from hf_quant.diffusion.denoising import Denoising, takes_timestep
from hf_quant.diffusion.drawing import Drawing
from hf_quant.errors import CalibrationError, ConfigError, UnsupportedModel
from hf_quant.stages.sampler import Batch, model_inputs_of
from hf_quant.stages.timesteps import DensityDiversity, SkewedNormal
from hf_quant.stages.trajectories import Trajectories, _Rows

CALLS = []


class Stack(DDIMPipeline):  # type: ignore[misc]  # diffusers is not typed
    """Draws by class, with both branches of the guidance in one call, or in two; counts what it draws at once."""

    apart = False

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        CALLS.append((num_inference_steps, guidance_scale, output_type, len(class_labels)))
        x = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.scale_model_input(x, t)
            labels = torch.tensor(class_labels)
            if self.apart:
                e = self.unet(x, t, class_labels=labels).sample
                u = self.unet(x, t, class_labels=torch.zeros_like(labels)).sample
            else:
                both = torch.cat([labels, torch.zeros_like(labels)])
                e, u = self.unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
            x = self.scheduler.step(u + guidance_scale * (e - u), t, x).prev_sample
        return x


def unet(classes: int | None = 11) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()


def by_class(scheduler: Any = None) -> Denoising:
    pipeline = Stack(unet(), scheduler or DDIMScheduler())
    return Denoising(pipeline, "unet", Drawing(class_labels=range(1, 11)))


def rows(batches: list[Batch], name: str) -> Tensor:
    return torch.cat([b[name] for b in batches])


def sample(data: Denoising, sampler: Trajectories, seed: int = 0) -> list[Batch]:
    return sampler.sample(data, None, seed, data.network)


def test_rows_are_what_the_network_is_called_with() -> None:
    """Recorded rows of step s, replayed: the scheduler's step on them gives rows of step s + 1 of the same image."""
    data = by_class()
    CALLS.clear()
    batches = sample(data, Trajectories(steps=4, samples=12, batch_size=5))
    assert CALLS[1:] == [(4, 4.0, "latent", 3)]  # 3 samples a step are 3 images; the first call was one image's
    assert [len(b["sample"]) for b in batches] == [5, 5, 5, 5, 4]  # 12 points with two branches each
    t, x, labels = rows(batches, "timestep"), rows(batches, "sample"), rows(batches, "class_labels")
    assert t.unique(return_counts=True)[1].tolist() == [6] * 4
    assert sorted(labels.tolist()) == [0] * 12 + [1] * 4 + [2] * 4 + [3] * 4
    assert any(len(b["timestep"].unique()) > 1 for b in batches)
    first = {int(c): x[(t == 750) & (labels == c)][0] for c in (1, 2, 3)}
    for c, noise in first.items():
        assert any(torch.equal(noise, other) for other in x[(t == 750) & (labels == 0)])  # the other branch
        data.pipeline.scheduler.set_timesteps(4)
        with torch.no_grad():
            e = data.network(noise[None], 750, class_labels=torch.tensor([c])).sample
            u = data.network(noise[None], 750, class_labels=torch.tensor([0])).sample
        after = data.pipeline.scheduler.step(u + 4.0 * (e - u), torch.tensor(750), noise[None]).prev_sample
        torch.testing.assert_close(after[0], x[(t == 500) & (labels == c)][0], rtol=1e-4, atol=1e-5)


def test_it_is_a_function_of_the_seed_and_draws_from_no_global_generator() -> None:
    data, how = by_class(DDPMScheduler()), Trajectories(steps=3, samples=9, timesteps=SkewedNormal())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = sample(data, how)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    two, other = sample(data, how), sample(data, how, seed=1)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(rows(one, "sample"), rows(other, "sample"))
    assert not data.network._forward_hooks


def test_what_is_longer_than_the_rows_is_shared() -> None:
    """Flux's ids of positions: as many as there are patches, the same for all images."""
    kept, ids = _Rows(), torch.arange(27.0).reshape(9, 3)
    for t in (0.9, 0.1):
        kept.add({"hidden_states": torch.randn(3, 9, 4), "timestep": torch.tensor(t), "img_ids": ids}, 3, [0, 2])
    (batch,) = kept.batches(4, torch.Generator().manual_seed(0))
    assert torch.equal(batch["img_ids"], ids)
    assert batch["hidden_states"].shape == (4, 9, 4)
    assert batch["timestep"].shape == (4,)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' Heun
def test_branches_called_apart_and_schedulers_that_call_twice() -> None:
    data = by_class()
    data.pipeline.apart = True
    batches = sample(data, Trajectories(steps=4, samples=8))
    assert len(rows(batches, "sample")) == 16
    assert (rows(batches, "class_labels") == 0).sum() == 8
    twice = sample(by_class(HeunDiscreteScheduler()), Trajectories(steps=4, samples=8))
    assert len(rows(twice, "timestep").unique()) == 4


def test_steps_are_weighed_and_images_are_as_many_as_the_most_wanted_needs() -> None:
    data = by_class()
    CALLS.clear()
    batches = sample(data, Trajectories(steps=5, samples=50, timesteps=SkewedNormal(), batch_size=8))
    _, counts = rows(batches, "timestep").unique(return_counts=True)
    wanted = SkewedNormal().counts(torch.tensor([0.8, 0.6, 0.4, 0.2, 0]), None, 50)
    assert counts.flip(0).tolist() == [2 * n for n in wanted]
    assert sum(n for *_, n in CALLS[1:]) == max(wanted)
    by_features = sample(data, Trajectories(steps=5, samples=20, timesteps=DensityDiversity()))
    assert len(rows(by_features, "sample")) == 40


def test_unconditional_pipelines_of_diffusers() -> None:
    pipeline = DDIMPipeline(unet(None), DDIMScheduler())
    data = Denoising(pipeline, "unet", Drawing())
    data.check()
    batches = sample(data, Trajectories(steps=4, samples=8, batch_size=3))
    assert [len(b["sample"]) for b in batches] == [3, 3, 2]
    assert batches[0].keys() == {"sample", "timestep"}
    assert pipeline._progress_bar_config == {}


def test_shared_tensors_and_dicts_of_tensors() -> None:
    kept = _Rows()
    for scale in (1, 2):
        inputs = {
            "x": torch.arange(4.0).reshape(4, 1) * scale,
            "timestep": torch.tensor(7),
            "ids": torch.arange(6).reshape(3, 2),
            "added.text": torch.arange(4.0).reshape(4, 1) + 10,
        }
        kept.add(inputs, 2, [1])
    (batch,) = kept.batches(8, torch.Generator().manual_seed(0))
    assert sorted(batch["x"].flatten().tolist()) == [1, 2, 3, 6]  # both branches of the second image
    assert batch["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch["timestep"].tolist() == [7] * 4
    given = model_inputs_of(batch | {"@weight": torch.ones(4)})
    assert given.keys() == {"x", "timestep", "ids", "added"}
    assert sorted(given["added"]["text"].flatten().tolist()) == [11, 11, 13, 13]
    with pytest.raises(UnsupportedModel, match="3 rows for 2 images"):
        kept.add({"x": torch.zeros(3, 1)}, 2, [0])


def test_refusals() -> None:
    data = by_class()
    with pytest.raises(ConfigError, match="10 samples are too few for 20 steps"):
        Trajectories(samples=10)
    with pytest.raises(ConfigError, match="steps=0"):
        Trajectories(steps=0)
    with pytest.raises(CalibrationError, match="class_labels="):
        Trajectories().sample(None, None, 0, data.network)
    with pytest.raises(ConfigError, match="draws from classes"):
        Denoising(data.pipeline, "unet", Drawing()).check()
    with pytest.raises(ConfigError, match="takes no height"):
        Denoising(data.pipeline, "unet", Drawing(class_labels=[1], arguments={"height": 8})).check()
    bare = Stack(unet(), DDIMScheduler())
    bare.scheduler = None
    with pytest.raises(UnsupportedModel, match="no scheduler"):
        Denoising(bare, "unet", Drawing(class_labels=[1])).check()
    idle = Denoising(data.pipeline, "scheduler", data.drawing)
    assert takes_timestep(data.network)
    assert not takes_timestep(idle.network)
