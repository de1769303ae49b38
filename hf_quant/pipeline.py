"""The pipeline: plan, sample, rotate, allocate, loop over the blocks, train; a model and a recipe in, a report out."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hf_quant.allocation.allocate import allocate
from hf_quant.diffusion.denoising import Denoising
from hf_quant.diffusion.timesteps import follow_timesteps
from hf_quant.errors import UnsupportedModel
from hf_quant.learning.trained import train
from hf_quant.loop import Loop
from hf_quant.plan import Plan, make_plan, with_units
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Report
from hf_quant.rewriting.rotate import rotate_whole
from hf_quant.rewriting.rotated_loss import RotatedLoss
from hf_quant.running.distributed import my_share
from hf_quant.running.resources import peak_bytes, require_device, versions
from hf_quant.running.run_dir import RunDir
from hf_quant.runtime.apart import put_back_floats, take_apart
from hf_quant.runtime.rotating import Rotating, Scaling, Shifting
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import WholeTransform


def quantize(model: nn.Module, recipe: Recipe, job: Job) -> Report:
    """Quantize `model` in place.

    Raises:
        ConfigError, UnsupportedModel, UnsupportedSpec: found while planning; the model is untouched.
        CalibrationError: the data is unusable, or never reached a site that `job.allow` does not name.
        RunError: `job.run_dir` belongs to another job, is locked, or the disk is full; finished blocks are kept.
    """
    started = time.perf_counter()
    _refuse_offloaded(model)
    require_device(job.device)
    with apart(model):
        plan = make_plan(model, recipe, job)
        _refuse_hooked(model, plan)
        batches: list[Batch] = []
        if any(not r.data_free for r in (recipe, *(p.recipe for p in plan.sites.values()))):
            batches = recipe.sampler.sample(job.data, job.processor, job.seed, model)
        if recipe.trainer is not None:
            recipe.trainer.check(model, batches)
        named = job.data.drawing.class_labels if isinstance(job.data, Denoising) else ()  # few samples miss some
        timed = follow_timesteps(model, recipe, plan, batches, named)
        with RunDir.open(job.run_dir, model, recipe, job, batches) as run_dir:
            whole = [t for t in recipe.transforms if isinstance(t, WholeTransform)]
            for transform in whole:
                lend = lambda m, body: RotatedLoss(m, body, plan.sites, batches)  # noqa: E731
                rotate_whole(model, plan.blocks, transform, batches, job.seed, lend)
            if whole:
                plan = make_plan(model, recipe, job)  # what was tied may no longer be
            floats = {n: model.get_submodule(n) for n, p in plan.sites.items()} if recipe.trainer else {}
            plan = with_units(plan, model, recipe, batches)
            loop = Loop(model, recipe, job, plan, my_share(batches), run_dir)
            loop.timed = replace(timed, batches=loop.batches) if timed else None
            if recipe.allocator is not None and plan.is_open:
                loop.refuse_unreached()
                loop.plan = allocate(model, recipe.allocator, plan, job, batches, run_dir)
            entries = loop.run()
            training: dict[str, float] = {}
            if recipe.trainer is not None:
                entries, training = train(model, recipe.trainer, loop.plan, floats, batches, job, entries, timed)
    return Report(
        method={},
        coverage=tuple(entries) + loop.plan.kept,
        seconds=run_dir.seconds + time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        calibration=describe_batches(batches, job),
        versions=versions(),
        training=training,
    )


def _refuse_offloaded(model: nn.Module) -> None:
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise UnsupportedModel(
            f"{len(away)} weights are offloaded, the first is {away[0]}: load the model without offload to quantize it "
            "(one block at a time is on the device: QuantConfig(device=...)), save it, then load it with offload"
        )


def _refuse_hooked(model: nn.Module, plan: Plan) -> None:
    """A hook on a float layer would not run on the quantized one, nor when that is saved and loaded."""
    for name in plan.sites:
        module = model.get_submodule(name)
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not isinstance(hook, Rotating | Scaling | Shifting) for hook in hooks):
            raise UnsupportedModel(
                f"{name} has forward hooks, which a quantized layer in its place would not run: remove them and "
                "register them again afterwards (weight_norm and spectral_norm of torch.nn.utils are such hooks, too)"
            )


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """In eval mode, every matrix a layer of its own; afterwards what was not quantized is as it was.

    A module that stands in several places is quantized in one and then put in all of them.
    """
    were_training = {module: module.training for module in model.modules()}
    model.eval()
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    take_apart(model)
    try:
        yield
    finally:
        put_back_floats(model)
        for first, *others in places.values():
            for other in others:
                model.set_submodule(other, model.get_submodule(first))
        model.train(were_training[model])
        for module, training in were_training.items():
            module.training = training


def describe_batches(batches: Sequence[Batch], job: Job) -> dict[str, Any]:
    """Source, seed, samples, tokens and fingerprint of the calibration data; empty when none was used."""
    if not batches:
        return {}
    from hf_quant.data.calibration import describe, fingerprint

    first = [next(iter(b.values())) for b in batches]
    return {
        "source": "made up" if job.data is None else describe(job.data),
        "seed": job.seed,
        "samples": sum(len(x) for x in first),
        "tokens": sum(x.numel() for x in first) if not first[0].is_floating_point() else None,
        "fingerprint": fingerprint(batches),
    }
