"""Trained: the float layers back in place, a trainer on the whole model, and what it made of them packed again."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_quant.capture import answer, run_model
from hf_quant.diffusion.timesteps import Timed
from hf_quant.install import install
from hf_quant.learning.tuning import fitted
from hf_quant.plan import Plan
from hf_quant.recipe import Job
from hf_quant.report import Entry
from hf_quant.rewriting.rewrite import float_weight
from hf_quant.running.progress import track
from hf_quant.solve import Solved, relative_error
from hf_quant.stages.sampler import Batch
from hf_quant.stages.trainer import Trainer


def train(
    model: nn.Module,
    trainer: Trainer,
    plan: Plan,
    floats: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    job: Job,
    entries: Sequence[Entry],
    timed: Timed | None = None,
) -> tuple[list[Entry], dict[str, float]]:
    """Train the sites whose recipe has this trainer, from the codes that the solver left in `model`.

    Args:
        floats: every site's float layer, as it was.
        entries: of the loop.
        timed: the clock that tables of input ranges read, where there are any.

    Returns:
        The entries with the errors after training, and what the trainer measured.
    """
    started = time.perf_counter()
    home = next(p.device for p in model.parameters())
    device = job.device or home
    plans = {n: p for n, p in plan.sites.items() if p.recipe.trainer == trainer and p.site.kind != "embedding"}
    model.to(device)  # all of it: a gradient runs through the whole model
    start = {}
    for name in plans:
        start[name] = fitted(model.get_submodule(name))
        model.set_submodule(name, floats[name].to(device))
    others = {n: floats[n].to(device) for n in plan.sites if n not in plans}
    folder = None if job.run_dir is None else job.run_dir / "training"
    for _ in track([trainer], description="training", enabled=job.progress):
        trained = trainer.train(model, start, batches, job.seed, folder, others)
    seconds = round((time.perf_counter() - started) / max(1, len(plans)), 4)
    of = {e.name: e for e in entries}
    with torch.no_grad():
        for name, site in plans.items():
            branches = (trained.branches[name],) if name in trained.branches else ()
            q = trained.weights[name]
            weight = float_weight(model.get_submodule(name), site.site)
            bits = sum(t.numel() * weight.element_size() * 8 for b in branches for t in b.tensors)
            entry = replace(
                of[name + ".weight"],
                error=relative_error(weight, q, branches, None),
                error_of="weight",
                bits=site.bits + bits,
                seconds=(of[name + ".weight"].seconds or 0) + seconds,
            )
            of[entry.name] = entry
            inputs, ranges = start[name].inputs, trained.input_ranges.get(name)
            install(model, site, Solved(q, branches, inputs, ranges, entry))
        if timed is not None:
            timed.give(model)
        for name, vector in trained.kept.items():
            model.get_parameter(name).copy_(vector)
        measured = trained.measured | _difference(model, trained.probe)
    model.to(home)
    return list(of.values()), measured


def _difference(model: nn.Module, probe: tuple[Batch, Tensor] | None) -> dict[str, float]:
    """How far the packed model, run by the kernels that will run it, is from the student that was trained."""
    if probe is None:
        return {}
    batch, said = probe
    now = answer(run_model(model, batch, said.device))
    return {"logits": float(said.abs().max()), "logit_difference": float((now - said).abs().max())}
