"""Trajectories: the Sampler of diffusion models. Rows (x_t, t, condition) from where the model will really be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.diffusion.denoising import PROBE, Denoising, Inputs
from hf_quant.errors import CalibrationError, ConfigError, UnsupportedModel
from hf_quant.runtime.clock import NAME
from hf_quant.sites import find_blocks
from hf_quant.stages.sampler import Batch, TextSampler
from hf_quant.stages.timesteps import TimestepSampler, Uniform


@dataclass(frozen=True, slots=True)
class Trajectories:
    """`samples` points of the model's own denoising trajectories, divided among the steps by `timesteps`.

    One trajectory is run to see the steps. Then as many as the most wanted step has samples are; a step with fewer
    samples takes a random part of them. Of every point all branches of the guidance are kept, each a row: what is held
    in memory are those rows and one running batch. Rows are shuffled, so a micro-batch has many timesteps.
    Batches of the network's inputs, if these are what the user gives, pass through unchanged.

    Attributes:
        steps: of denoising.
        samples: points kept in all.
        timesteps: how they are divided among the steps.
        batch_size: rows in a micro-batch; images drawn at once.
    """

    steps: int = 20
    samples: int = 256
    timesteps: TimestepSampler = Uniform()
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: an integer of at least 1")
        if self.samples < self.steps:
            raise ConfigError(
                f"{self.samples} samples are too few for {self.steps} steps of denoising: at least one for each"
            )

    def sample(self, data: Any, processor: Any, seed: int, model: nn.Module) -> list[Batch]:  # noqa: ANN401
        """See `Sampler.sample`.

        Raises:
            CalibrationError: no data, or the pipeline never calls the model.
            UnsupportedModel: the pipeline calls it in a way that rows cannot hold.
        """
        if data is None:
            raise CalibrationError(
                "this needs trajectories: hf_quant.quantize(pipeline, config, prompts=[...] or class_labels=[...]) "
                "records them; for a network alone pass data=[batches of its inputs]"
            )
        if not isinstance(data, Denoising):
            return TextSampler(samples=self.samples).sample(data, processor, seed)
        times, features = _probe(data, model, self.steps, seed, self.timesteps.features)
        t_S = torch.tensor(times)
        if float(t_S.max()) > 1:
            t_S = t_S / float(getattr(data.pipeline.scheduler.config, "num_train_timesteps", t_S.max()))
        counts = self.timesteps.counts(t_S, features, self.samples)
        images, generator = max(counts), torch.Generator().manual_seed(seed)
        chosen = [set(torch.randperm(images, generator=generator)[:count].tolist()) for count in counts]
        kept = _Rows()
        for first in range(0, images, self.batch_size):
            taker = _Taker(times, chosen, range(first, min(images, first + self.batch_size)), kept)
            data.watch(taker.numbers, self.steps, seed, taker.see)
        return list(kept.batches(self.batch_size, generator))


def _probe(data: Denoising, model: nn.Module, steps: int, seed: int, wanted: bool) -> tuple[list[float], Tensor | None]:
    """The timesteps of one trajectory, each once and in order, and what the middle block puts out at each."""
    times: list[float] = []
    features: list[Tensor] = []
    latest: list[Tensor] = []
    handles = []

    def see(inputs: Inputs) -> None:
        t = _time(inputs)
        if not times or t != times[-1]:
            times.append(t)
            features.extend(latest)

    def after(_: nn.Module, args: Any, out: Any) -> None:  # noqa: ANN401
        hidden = out if isinstance(out, Tensor) else out[0]
        latest[:] = [hidden[:1].detach().float().flatten().cpu()]

    if wanted:
        handles.append(_middle(model).register_forward_hook(after))
    try:
        data.watch([0], steps, seed + PROBE, see)
    finally:
        for handle in handles:
            handle.remove()
    if not times:
        raise CalibrationError(
            f"{type(data.pipeline).__name__} never calls its {data.component} as a module: nothing to calibrate on; "
            "use a method that needs no data there, such as rtn"
        )
    return times, torch.stack(features) if features else None


def _middle(model: nn.Module) -> nn.Module:
    middle, blocks = getattr(model, "mid_block", None), find_blocks(model)
    if isinstance(middle, nn.Module):
        return middle
    if not blocks:
        raise UnsupportedModel(f"{type(model).__name__} has no blocks whose features could tell its timesteps apart")
    return model.get_submodule(blocks[len(blocks) // 2])


def _time(inputs: Inputs) -> float:
    """The timestep of a call; 0 of a component that takes none."""
    return float(inputs[NAME].max()) if NAME in inputs else 0.0


@dataclass(slots=True, eq=False)
class _Taker:
    """Takes what is wanted of the calls of one run. A new timestep begins the next step; guidance may call twice."""

    times: list[float]
    chosen: list[set[int]]
    numbers: Sequence[int]
    kept: "_Rows"
    at: int = 0

    def see(self, inputs: Inputs) -> None:
        """One call."""
        t = _time(inputs)
        if t != self.times[self.at] and self.at + 1 < len(self.times):
            self.at += 1
        if t != self.times[self.at]:
            raise UnsupportedModel(f"timestep {t} on one trajectory, {self.times[self.at]} at this step of another")
        wanted = [i for i, number in enumerate(self.numbers) if number in self.chosen[self.at]]
        self.kept.add(inputs, len(self.numbers), wanted)


@dataclass(slots=True, eq=False)
class _Rows:
    """Rows of calls; those of other shapes, or beside other shared tensors, lie apart."""

    kinds: dict[Any, tuple[dict[str, list[Tensor]], Batch]] = field(default_factory=dict)

    def add(self, inputs: Inputs, images: int, wanted: list[int]) -> None:
        """Keep the wanted images of a call, each with all its branches."""
        if not wanted:
            return
        rows = len(next(iter(inputs.values())))  # of what is denoised; Flux's ids of positions are longer
        if rows % images:
            raise UnsupportedModel(f"a call with {rows} rows for {images} images: they cannot be told apart")
        if NAME in inputs and inputs[NAME].numel() == 1:
            inputs[NAME] = inputs[NAME].reshape(1).expand(rows)
        at = torch.tensor([b * images + i for b in range(rows // images) for i in wanted])
        own = {n: v[at.to(v.device)].cpu() for n, v in inputs.items() if v.dim() and len(v) == rows}
        shared = {n: v.cpu() for n, v in inputs.items() if n not in own}
        key = (
            tuple((n, v.shape[1:], v.dtype) for n, v in own.items()),
            tuple((n, v.shape, v.dtype, tuple(v.flatten().tolist())) for n, v in shared.items()),
        )
        found, _ = self.kinds.setdefault(key, ({n: [] for n in own}, shared))
        for name, value in own.items():
            found[name].append(value)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """All rows, shuffled and cut."""
        for lists, shared in self.kinds.values():
            joined = {name: torch.cat(parts) for name, parts in lists.items()}
            order = torch.randperm(len(next(iter(joined.values()))), generator=generator)
            for part in order.split(size):
                yield {**{name: value[part] for name, value in joined.items()}, **shared}
