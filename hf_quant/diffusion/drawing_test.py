"""Drawing from pipelines."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel

from hf_quant.diffusion.drawing import Call, Drawing, backbone, watched
from hf_quant.errors import ConfigError, RunError, UnsupportedModel


def unet_pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    made = DDIMPipeline(net, DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def small_dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_a_picture_depends_on_its_own_noise_alone() -> None:
    pipeline, asked = unet_pipeline(), Drawing(steps=2)
    both = asked.draw(pipeline, [0, 1], noise(5, 6))
    assert both.shape == (2, 8, 8, 1)
    alone = asked.draw(pipeline, [1], noise(6))
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert not torch.equal(both[0], both[1])


def test_of_a_video_the_frame_in_the_middle_is_drawn() -> None:
    """Videos are `[n, frames, C, H, W]`, or arrays with the channels last."""
    frames = torch.rand(2, 5, 3, 8, 8)

    class Video(DDIMPipeline):  # type: ignore[misc]
        def __call__(self, batch_size, num_inference_steps, generator, output_type):  # type: ignore[no-untyped-def]
            return SimpleNamespace(frames=self.found)

    pipeline = Video(unet_pipeline().unet, DDIMScheduler())
    for pipeline.found in (frames, frames.permute(0, 1, 3, 4, 2).numpy()):
        assert torch.equal(Drawing().draw(pipeline, [0, 1], noise(0, 1)), frames[:, 2].permute(0, 2, 3, 1))


def test_calls_are_watched_as_they_were_made() -> None:
    pipeline, calls = unet_pipeline(), list[Call]()
    network = backbone(pipeline)
    with watched(network, calls.append):
        Drawing(steps=3).draw(pipeline, [0, 1], noise(5, 6))
    Drawing(steps=1).draw(pipeline, [0], noise(5))
    assert [c.timestep for c in calls] == [666.0, 333.0, 0.0]
    with torch.no_grad():
        for call in calls:
            assert call.sample.shape == (2, 1, 8, 8)
            assert call.batch["timestep"].shape == (2,)
            assert torch.equal(network(**call.arguments).sample, call.answer)
            torch.testing.assert_close(network(**call.batch).sample, call.answer)


def test_classes_go_round() -> None:
    assert Drawing(class_labels=[3, 7]).labels([0, 1, 2, 5]) == [3, 7, 3, 7]
    assert Drawing(class_labels=torch.arange(3)).labels([4]) == [1]
    assert Drawing().labels([0]) is None


def test_a_text_is_no_list_of_prompts() -> None:
    """Its letters would be drawn, one after the other, without a word."""
    for wrong in ({"prompts": "a red cube"}, {"prompts": [1]}, {"class_labels": 3}, {"class_labels": ["dog"]}):
        with pytest.raises(ConfigError, match="a list of"):
            Drawing(**wrong)
    assert Drawing(prompts=(p for p in ["a", "b"])).prompts == ("a", "b")


def test_arguments_of_the_call() -> None:
    """A text is every picture's; what the drawing sets itself is asked for otherwise; what goes wrong is told."""
    calls = []

    class Texts(DDIMPipeline):  # type: ignore[misc]
        def __call__(self, prompt, negative_prompt=None, image=None, latents=None, num_inference_steps=1,  # type: ignore[no-untyped-def]
                     generator=None, output_type=""):  # fmt: skip
            calls.append((prompt, negative_prompt))
            if image is None:
                raise ValueError("Input is in incorrect format")

    pipeline = Texts(unet_pipeline().unet, DDIMScheduler())
    given = Drawing(prompts=["a", "b"], arguments={"negative_prompt": "ugly", "image": 1})
    given.check(pipeline)
    given.run(pipeline, [0, 1, 2], noise(0, 1, 2), "latent")
    assert calls == [(["a", "b", "a"], ["ugly"] * 3)]
    with pytest.raises(ConfigError, match=r"Texts cannot be called with .*incorrect format.*arguments=\{"):
        Drawing(prompts=["a"]).run(pipeline, [0], noise(0), "latent")
    broken = unet_pipeline()
    broken.unet.conv_in.forward = lambda x: len(None)  # type: ignore[method-assign,arg-type]
    with pytest.raises(TypeError, match="has no len"):
        Drawing().run(broken, [0], noise(0), "latent")
    for argument, message in (("latents", "noise of its own"), ("num_inference_steps", "give steps")):
        with pytest.raises(ConfigError, match=message):
            Drawing(prompts=["a"], arguments={argument: 1}).check(pipeline)


def test_refusals() -> None:
    pipeline = unet_pipeline()
    Drawing().check(pipeline)
    for wrong, message in (
        (Drawing(steps=0), "1 or more"),
        (Drawing(class_labels=[1]), "takes no classes"),
        (Drawing(prompts=["a"]), "takes no prompts"),
        (Drawing(guidance=2.0), "no guidance"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong.check(pipeline)
    by_class = DiTPipeline(small_dit(), AutoencoderKL(), DDIMScheduler())
    assert backbone(by_class) is by_class.transformer
    with pytest.raises(ConfigError, match=r"class_labels=range\(10\)"):
        Drawing().check(by_class)
    for label in (-1, 2000):
        with pytest.raises(ConfigError, match="classes 0 to 1000"):
            Drawing(class_labels=[1, label]).check(by_class)
    with pytest.raises(UnsupportedModel, match="no unet and no transformer"):
        backbone(SimpleNamespace())


def test_pictures_that_are_no_numbers() -> None:
    pipeline = unet_pipeline()
    pipeline.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(RunError, match="diverges"):
        Drawing(steps=1).draw(pipeline, [0], noise(0))
