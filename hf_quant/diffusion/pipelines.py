"""Pipelines of diffusers, quantized whole: which components, on what they are calibrated, what they draw afterwards."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.config import QuantConfig
from hf_quant.diffusion.denoising import PROBE, Denoising, quiet, takes_timestep
from hf_quant.diffusion.drawing import Drawing
from hf_quant.errors import CalibrationError, ConfigError, HfQuantError, UnsupportedModel
from hf_quant.integrations.finish import refuse_quantized, refuse_wrapped, run_quantizer
from hf_quant.method import did_you_mean
from hf_quant.recipe import HfQuantizer, Job, Recipe
from hf_quant.report import Report
from hf_quant.stages.trajectories import Trajectories

NOISE = 7_000_000  # seed of the pictures on the card, far from those of calibration

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """The same noise and conditions before and after: `[n, H, W, C]` in 0 .. 1 each."""

    drawing: Drawing
    full: Tensor
    quantized: Tensor


def is_pipeline(given: object) -> bool:
    """Whether it is a pipeline of diffusers: no module, made of components."""
    return not isinstance(given, nn.Module | type) and hasattr(given, "components") and callable(given)


def networks(pipeline: Any) -> dict[str, nn.Module]:  # noqa: ANN401
    """The components that have weights."""
    return {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}


def configs_of(pipeline: Any, config: object) -> dict[str, QuantConfig]:  # noqa: ANN401
    """Component -> its config, in the order given; one config alone is that of every network that denoises.

    The mapping of diffusers' PipelineQuantizationConfig is such a mapping, too.

    Raises:
        ConfigError: no such component, no QuantConfig.
        UnsupportedModel: nothing in it denoises, so its components have to be named.
    """
    there, name = networks(pipeline), type(pipeline).__name__
    if isinstance(config, QuantConfig):
        found = [n for n, m in there.items() if takes_timestep(m)]
        if not found:
            raise UnsupportedModel(
                f"no component of {name} takes a timestep: name those to quantize, {{component: config}}, of "
                f"{', '.join(there) or 'none'}"
            )
        return dict.fromkeys(found, config)
    config = getattr(config, "quant_mapping", None) or config
    if not isinstance(config, Mapping) or not config:
        raise ConfigError(
            "a pipeline takes a QuantConfig for what denoises, or {component: QuantConfig}, not "
            f"{type(config).__name__}"
        )
    for component, own in config.items():
        if component not in there:
            raise ConfigError(
                f"{name} has no network {component!r}{did_you_mean(str(component), there)}; it has: {', '.join(there)}"
            )
        if not isinstance(own, QuantConfig):
            raise ConfigError(f"{component}: a QuantConfig, not {type(own).__name__}")
    return dict(config)


def quantize_pipeline(
    pipeline: Any,  # noqa: ANN401
    config: object,
    drawing: Drawing,
    *,
    steps: int | None = None,
    pictures: int = 4,
    progress: bool = True,
    run: Callable[[HfQuantizer, nn.Module, Job], Report] = lambda how, model, job: how.quantize(model, job),
) -> dict[str, Report]:
    """Quantize components of a pipeline in memory, in place, one after the other.

    Each is calibrated on what the pipeline calls it with by then: on the trajectories that the method's own sampler
    takes, or on `Trajectories()` when that expects texts, of `steps` where given. A config with calibration data of its
    own keeps to it. `run` is what is done with a component.

    Raises:
        ConfigError, UnsupportedModel: found before anything is drawn.
    """
    configs = configs_of(pipeline, config)
    recipes = {name: _on_trajectories(own, steps) for name, own in configs.items()}
    lengths = {n: r.sampler.steps for n, r in recipes.items() if isinstance(getattr(r, "sampler", None), Trajectories)}
    drawing = replace(drawing, steps=steps or next(iter(lengths.values()), drawing.steps))
    if pictures < 0:
        raise ConfigError(f"pictures={pictures}: 0 or more")
    can_draw = _can_draw(pipeline, drawing, any(_draws(own) for own in configs.values()))
    for name in configs:
        refuse_quantized(getattr(pipeline, name))
        refuse_wrapped(getattr(pipeline, name))
    _refuse_unseen(pipeline, [n for n, own in configs.items() if _draws(own)], drawing)
    before = _pictures(pipeline, drawing, pictures) if can_draw else None
    reports = {}
    for name, own in configs.items():
        asked = replace(drawing, steps=lengths.get(name, drawing.steps))
        data = Denoising(pipeline, name, asked) if _draws(own) else None
        job = own.job(data=data, progress=progress)
        if job.run_dir is not None and len(configs) > 1:
            job = replace(job, run_dir=job.run_dir / name)
        reports[name] = run_quantizer(getattr(pipeline, name), own, partial(run, recipes[name]), job)
    after = None if before is None else _pictures(pipeline, drawing, pictures)
    pipeline.hf_quant_pictures = None if before is None or after is None else Pictures(drawing, before, after)
    return reports


def _draws(config: QuantConfig) -> bool:
    """Whether it needs to see what the pipeline does."""
    recipes = [config.quantizer(), *config.overridden().values()]
    free = all(r is None or (isinstance(r, Recipe) and r.data_free) for r in recipes)
    return not free and config.calibration.data is None


def _on_trajectories(config: QuantConfig, steps: int | None) -> Any:  # noqa: ANN401  an HfQuantizer; often a Recipe
    quantizer = config.quantizer()
    if not _draws(config) or not isinstance(quantizer, Recipe):
        return quantizer
    sampler = quantizer.sampler if isinstance(quantizer.sampler, Trajectories) else Trajectories()
    return replace(quantizer, sampler=sampler if steps is None else replace(sampler, steps=steps))


def _refuse_unseen(pipeline: Any, names: list[str], drawing: Drawing) -> None:  # noqa: ANN401
    """Before the first of several components takes its hours: one trajectory, on which each has to be called."""
    seen: set[str] = set()
    if len(names) > 1:
        with ExitStack() as stack:
            for name in names:
                hook = getattr(pipeline, name).register_forward_pre_hook(lambda *_, name=name: seen.add(name))
                stack.callback(hook.remove)
            Denoising(pipeline, names[0], drawing).watch([0], drawing.steps, PROBE, lambda _: None)
        if unseen := [n for n in names if n not in seen]:
            raise CalibrationError(
                f"{type(pipeline).__name__} never calls its {', '.join(unseen)} as a module: nothing to calibrate on; "
                "use a method that needs no data there, such as rtn"
            )


def _can_draw(pipeline: Any, drawing: Drawing, must: bool) -> bool:  # noqa: ANN401
    """Whether what is given is enough to draw; raises when it must be."""
    try:
        Denoising(pipeline, "", drawing).check()
    except HfQuantError:
        if must or drawing.prompts or drawing.class_labels:
            raise
        return False
    return True


def _pictures(pipeline: Any, drawing: Drawing, count: int) -> Tensor | None:  # noqa: ANN401
    """Drawn from noise that is the same every time; None when there are none to be had."""
    noise = [torch.Generator().manual_seed(NOISE + i) for i in range(count)]
    try:
        with quiet(pipeline), torch.random.fork_rng():
            torch.manual_seed(NOISE)
            return drawing.draw(pipeline, range(count), noise) if count else None
    except HfQuantError as error:  # the model is what was asked for, its pictures are not
        _log.warning("the card will have no pictures: %s", error)
        return None
