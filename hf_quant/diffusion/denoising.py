"""Denoising: a pipeline of diffusers as calibration data. Its own loop is run, and calls of one component are seen.

Scheduler, guidance and conditions are the pipeline's: what a component is calibrated on is what it will be called with,
both branches of classifier-free guidance included. Nothing of diffusers is imported here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.diffusion.drawing import Call, Drawing, watched
from hf_quant.errors import UnsupportedModel
from hf_quant.runtime.clock import NAME

PROBE = 1 << 40  # seed of the one trajectory that is looked at first, far from those that are kept
Inputs = dict[str, Tensor]  # of one call: rows `[R, ...]`, and tensors that all rows share


def takes_timestep(module: object) -> bool:
    """Whether this is a network that denoises: its forward takes a `timestep`."""
    own = getattr(module, "_orig_mod", module)  # of what is compiled
    return isinstance(own, nn.Module) and NAME in inspect.signature(type(own).forward).parameters


@dataclass(frozen=True, slots=True, eq=False)
class Denoising:
    """What is drawn to see what a component is called with.

    Attributes:
        pipeline: of diffusers, or one that behaves like it.
        component: name of the network whose calls are seen.
        drawing: what is drawn; its steps, where the sampler does not say.
    """

    pipeline: Any
    component: str
    drawing: Drawing

    def __deepcopy__(self, memo: dict[int, Any]) -> "Denoising":
        return self

    def __repr__(self) -> str:
        scheduler, asked = getattr(self.pipeline, "scheduler", None), self.drawing
        how = [type(scheduler).__name__, f"{asked.steps} steps"]
        how += [] if asked.guidance is None else [f"guidance {asked.guidance:g}"]
        return f"{type(self.pipeline).__name__}'s own trajectories ({', '.join(how)})"

    @property
    def network(self) -> nn.Module:
        """The component."""
        module: nn.Module = getattr(self.pipeline, self.component)
        return module

    def check(self) -> None:
        """Stop before any work when the pipeline cannot be run on what is given.

        Raises:
            UnsupportedModel: it has no scheduler with timesteps, or draws from more than noise and a condition.
            ConfigError: no class labels or prompts where there must be, or some where there are none.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        if not hasattr(scheduler, "set_timesteps"):
            what = "no scheduler" if scheduler is None else f"a {type(scheduler).__name__}, which sets no timesteps"
            raise UnsupportedModel(
                f"{type(self.pipeline).__name__} has {what}, so its trajectories cannot be recorded: quantize the "
                "network alone, hf_quant.quantize(network, config, data=[batches of its inputs])"
            )
        self.drawing.check(self.pipeline)

    def watch(self, numbers: Sequence[int], steps: int, seed: int, see: Callable[[Inputs], None]) -> None:
        """Draw these pictures and show what the component is called with, in order. Each has noise of its own."""
        name = type(self.network).__name__

        def take(call: Call) -> None:
            see(dict(_tensors(name, call.arguments)))

        noise = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in numbers]
        asked = replace(self.drawing, steps=steps)
        with watched(self.network, take), quiet(self.pipeline), torch.random.fork_rng():
            torch.manual_seed(seed)  # for what a pipeline draws without its generator
            asked.run(self.pipeline, numbers, noise, "latent")


def _tensors(network: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments; those of a dict as "name.key"."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in _tensors(network, value))
        elif name == NAME and isinstance(value, int | float):
            yield name, torch.tensor(value)
        elif value is not None and not isinstance(value, bool) and value != []:
            raise UnsupportedModel(
                f"{network} is called with {name}={value!r:.40}, which is no tensor: recorded calls cannot hold; "
                "use a method that needs no data, such as rtn"
            )


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:  # noqa: ANN401
    """Without the pipeline's bar of progress."""
    before = getattr(pipeline, "_progress_bar_config", None) or {}
    pipeline._progress_bar_config = {**before, "disable": True}
    try:
        yield
    finally:
        pipeline._progress_bar_config = before
