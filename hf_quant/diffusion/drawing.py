"""Drawing: pictures of a diffusion pipeline from given noise, and what its network is called with on the way."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError, HfQuantError, RunError, UnsupportedModel
from hf_quant.runtime.clock import NAME as TIMESTEP
from hf_quant.stages.sampler import Batch

ELSEWHERE = {  # arguments of a pipeline's call that this sets: what to give instead
    "prompt": "give prompts=[...]",
    "class_labels": "give class_labels=[...]",
    "guidance_scale": "give guidance=...",
    "num_inference_steps": "give steps=...",
    **dict.fromkeys(("batch_size", "generator", "latents"), "each picture has noise of its own"),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), "each picture has a prompt of its own"),
    **dict.fromkeys(("output_type", "return_dict"), "what is drawn is read here"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How pictures are asked for. Picture i is drawn of class or prompt i, counted round and round.

    Attributes:
        steps: of denoising.
        guidance: scale of classifier-free guidance; None: the pipeline's own.
        class_labels: for pipelines that draw by class.
        prompts: for those that draw from texts.
        arguments: further ones of the pipeline's call, such as `height` or `num_frames`.
    """

    steps: int = 20
    guidance: float | None = None
    class_labels: Sequence[int] = ()
    prompts: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        prompts, labels = self.prompts, self.class_labels
        try:
            labels = labels if isinstance(labels, range) else tuple(map(index, labels))
        except TypeError:
            raise ConfigError(f"class_labels={labels!r:.60}: a list of classes, such as range(10)") from None
        prompts = prompts if isinstance(prompts, str) else tuple(prompts)
        if isinstance(prompts, str) or any(not isinstance(p, str) for p in prompts):
            raise ConfigError(f"prompts={prompts!r:.60}: a list of texts, such as ['a red cube']")
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "class_labels", labels)

    def labels(self, numbers: Sequence[int]) -> list[int] | None:
        """The classes of these pictures, None without classes."""
        return [self.class_labels[i % len(self.class_labels)] for i in numbers] if self.class_labels else None

    def check(self, pipeline: Any) -> None:  # noqa: ANN401
        """Whether the pipeline draws from noise and a class or a text alone, and these are given.

        Raises:
            UnsupportedModel: it does not.
            ConfigError: steps below 1, no class labels or prompts where there must be, some where there are none, or an
                argument that it does not take or that is asked for otherwise, or a class that it does not know.
        """
        every = inspect.signature(pipeline.__call__).parameters
        taken = {n: p for n, p in every.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        name = type(pipeline).__name__
        classes = classes_of(backbone(pipeline))
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: of denoising, 1 or more")
        if missing := {"num_inference_steps", "generator", "output_type"} - taken.keys():
            raise UnsupportedModel(f"{name} cannot be drawn from: it takes no {', '.join(sorted(missing))}")
        if unknown := self.arguments.keys() - taken.keys():
            raise ConfigError(f"{name} takes no {', '.join(sorted(unknown))}; it takes {', '.join(taken)}")
        for argument, instead in ELSEWHERE.items():
            if argument in self.arguments:
                raise ConfigError(f"{argument} cannot be among the arguments: {instead}")
        needed = {n for n, p in taken.items() if p.default is inspect.Parameter.empty} - {"class_labels", "prompt"}
        needed -= self.arguments.keys()
        if needed:
            raise UnsupportedModel(f"{name} draws from more than noise: it needs {', '.join(sorted(needed))}")
        for argument, given, what in (
            ("class_labels", self.class_labels, "classes, such as class_labels=range(10)"),
            ("prompt", self.prompts, "prompts, such as prompts=['a red cube']"),
        ):
            if argument in taken and not given:
                raise ConfigError(f"{name} draws from {what.split(',')[0]}: give {what}")
            if argument not in taken and given:
                raise ConfigError(f"{name} takes no {what.split(',')[0]}; leave them out")
        if self.class_labels and classes and not 0 <= min(self.class_labels) <= max(self.class_labels) < classes:
            raise ConfigError(f"class_labels={self.class_labels}: {name} knows classes 0 to {classes - 1}")
        if self.guidance is not None and "guidance_scale" not in taken:
            raise ConfigError(f"{name} has no guidance; leave guidance={self.guidance} out")

    def draw(self, pipeline: Any, numbers: Sequence[int], noise: torch.Generator | list[torch.Generator]) -> Tensor:  # noqa: ANN401
        """These pictures, `[n, H, W, C]` in 0 .. 1, from the noise of one generator, or one a picture.

        Of a video it is the frame in the middle.

        Raises:
            UnsupportedModel: what comes out are no pictures.
            RunError: they are not finite.
        """
        found = self.run(pipeline, numbers, noise, "pt")  # as arrays there is no bfloat16
        drawn, video = getattr(found, "images", None), getattr(found, "frames", None)
        if drawn is None and video is not None:
            drawn = video[:, video.shape[1] // 2]
        if drawn is None:
            raise UnsupportedModel(f"{type(pipeline).__name__} gives no images")
        known = isinstance(drawn, Tensor)  # some give arrays all the same, with the channels last
        pictures = (drawn.permute(0, 2, 3, 1) if known else torch.as_tensor(drawn)).float().cpu()
        if not pictures.isfinite().all():
            raise RunError("the pictures hold NaN or infinite values: a model that diverges has no score")
        return pictures

    @torch.no_grad()
    def run(
        self,
        pipeline: Any,  # noqa: ANN401
        numbers: Sequence[int],
        noise: torch.Generator | list[torch.Generator],
        output_type: str,
    ) -> Any:  # noqa: ANN401
        """What the pipeline returns for these pictures.

        Raises:
            ConfigError: it does not take what it is called with.
        """
        taken = inspect.signature(pipeline.__call__).parameters
        given: dict[str, Any] = {"num_inference_steps": self.steps, "generator": noise, "output_type": output_type}
        if "class_labels" in taken:
            given["class_labels"] = self.labels(numbers)
        elif "prompt" in taken:
            given["prompt"] = [self.prompts[i % len(self.prompts)] for i in numbers]
        else:
            given["batch_size"] = len(numbers)
        if self.guidance is not None:
            given["guidance_scale"] = self.guidance
        for argument, value in self.arguments.items():  # a text is that of every picture, as a list: prompts are one
            given[argument] = [value] * len(numbers) if isinstance(value, str) else value
        with answering(pipeline.components.values()):
            try:
                return pipeline(**given)
            except (TypeError, ValueError) as error:
                if isinstance(error, HfQuantError) or _in_a_network(error):
                    raise
                raise ConfigError(
                    f"{type(pipeline).__name__} cannot be called with {', '.join(given)}: {error!s:.300}; what else "
                    "it needs goes into arguments={...}"
                ) from error


def _in_a_network(error: Exception) -> bool:
    """Whether a module's forward raised it, for which no argument of the pipeline is to blame."""
    return any(frame.f_code.co_name == "forward" for frame, _ in traceback.walk_tb(error.__traceback__))


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of the network: all its arguments by name, and its answer."""

    arguments: dict[str, Any]
    answer: Tensor

    @property
    def sample(self) -> Tensor:
        """What is denoised: the first argument."""
        first: Tensor = next(iter(self.arguments.values()))
        return first

    @property
    def timestep(self) -> float:
        """Of the first sample."""
        return float(torch.as_tensor(self.arguments[TIMESTEP]).reshape(-1)[0])

    @property
    def batch(self) -> Batch:
        """The tensors among the arguments, a timestep for every sample: calibration data."""
        tensors = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        rows = len(self.sample)
        return {k: v.expand(rows) if v.dim() == 0 else v for k, v in tensors.items()}


@contextmanager
def answering(parts: Iterable[object]) -> Iterator[None]:
    """Out of training mode while this lasts: a pipeline that was not loaded drops labels at random, among others."""
    training = [m for part in parts if isinstance(part, nn.Module) for m in part.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watched(network: nn.Module, see: Callable[[Call], None]) -> Iterator[None]:
    """`see` is told every call of the network while this lasts."""
    signature = inspect.signature(type(network).forward)

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
        given = dict(signature.bind(network, *args, **kwargs).arguments)
        del given[next(iter(given))]  # self
        see(Call(given, answer_of(out)))

    handle = network.register_forward_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def answer_of(out: Any) -> Tensor:  # noqa: ANN401  a tuple, or an output of diffusers
    """The predicted noise (or velocity) in what a network returns."""
    answer: Tensor = out.sample if hasattr(out, "sample") else out[0]
    return answer


def name_of_backbone(pipeline: Any) -> str:  # noqa: ANN401
    """The name of its network among a pipeline's components.

    Raises:
        UnsupportedModel: it has none.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise UnsupportedModel(f"{type(pipeline).__name__} has no unet and no transformer")


def classes_of(network: nn.Module) -> int | None:
    """Rows of its table of classes, that of no class included; None without one."""
    return max((m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)), default=None)


def backbone(pipeline: Any) -> nn.Module:  # noqa: ANN401
    """The U-Net or transformer of a pipeline, which is what denoises.

    Raises:
        UnsupportedModel: it has none.
    """
    network: nn.Module = getattr(pipeline, name_of_backbone(pipeline))
    return network
