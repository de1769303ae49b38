"""Allocate: pass 1 of a run with a budget. It fills the table of losses and hands the loop a plan with a spec a site.

A block's losses are written at once, so a killed run resumes; the losses are those of the original weights, the inputs
those of the full-precision model, and no transform is applied.
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from hf_quant.capture import collect, run_model
from hf_quant.errors import PluginError
from hf_quant.groups import find_groups
from hf_quant.learning.fisher import fisher_states, of_inputs
from hf_quant.plan import Plan, SitePlan
from hf_quant.recipe import Job
from hf_quant.rewriting.rewrite import float_weight
from hf_quant.running.progress import track
from hf_quant.running.run_dir import RunDir
from hf_quant.sites import Site, SiteGroup
from hf_quant.solve import solve
from hf_quant.spec import Spec
from hf_quant.stages.allocator import Allocator, Rounded, Slot
from hf_quant.stages.sampler import Batch
from hf_quant.stats import Stat, State

Stats = dict[str, dict[Stat, State]]


def allocate(
    model: nn.Module, allocator: Allocator, plan: Plan, job: Job, batches: Sequence[Batch], run_dir: RunDir
) -> Plan:
    """The plan with every open site given one of its options. Every process of a run makes the same one.

    Args:
        batches: all of the calibration data, also when several processes share it.
    """
    groups = _groups(model, plan, batches)
    blocks = list(dict.fromkeys(g.sites[0].block for g in groups))
    table: list[tuple[Slot, tuple[float, ...]]] = []
    for block in track(blocks, description="measuring sensitivity", enabled=job.progress):
        here = [g for g in groups if g.sites[0].block == block]
        slots = [slot for group in here for slot in _slots(plan, group)]
        losses = run_dir.load_losses(block)
        if losses is None:
            rounded = _rounding(model, plan, here, batches)
            losses = allocator.sensitivity.losses(model, slots, rounded, batches, job.seed)
            _check_losses(allocator, slots, losses)
            run_dir.save_losses(block, losses)
        table += zip(slots, losses, strict=True)
    bits = [[sum(_option(plan, n, c).bits for n in slot.sites) for c in slot.choices] for slot, _ in table]
    picks = allocator.search.pick(bits, [losses for _, losses in table], plan.room)
    _check_picks(allocator, bits, picks, plan.room)
    chosen = {
        name: _option(plan, name, slot.choices[pick])
        for (slot, _), pick in zip(table, picks, strict=True)
        for name in slot.sites
    }
    return plan.choose(chosen)


def _check_losses(allocator: Allocator, slots: Sequence[Slot], losses: Sequence[Sequence[float]]) -> None:
    """Raises `PluginError` where the sensitivity did not give a number for every choice of every slot."""
    if [len(row) for row in losses] != [len(slot.choices) for slot in slots]:
        raise PluginError(
            f"{type(allocator.sensitivity).__name__}: a loss for every choice of every slot, got {losses}"
        )
    for slot, row in zip(slots, losses, strict=True):
        if not all(isfinite(loss) for loss in row):
            raise PluginError(
                f"{type(allocator.sensitivity).__name__}: the losses of {', '.join(slot.sites)} are {list(row)}; look "
                "for NaN or infinite activations on the calibration data"
            )


def _check_picks(allocator: Allocator, bits: Sequence[Sequence[int]], picks: Sequence[int], room: int) -> None:
    """Raises `PluginError` where the search did not pick one choice a slot, within the budget."""
    wrong = len(picks) != len(bits) or any(p not in range(len(b)) for p, b in zip(picks, bits, strict=True))
    if wrong or (spent := sum(b[p] for p, b in zip(picks, bits, strict=True))) > room:
        told = f"{list(picks)} are no choices" if wrong else f"they take {spent} bits, and there is room for {room}"
        raise PluginError(
            f"{type(allocator.search).__name__}: it is to pick a choice for each of {len(bits)} slots: {told}"
        )


def _groups(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> list[SiteGroup]:
    """Open sites of a block that read the same tensor, seen in one forward of the whole model, in its order."""
    sites = [p.site for p in plan.sites.values() if p.options]
    found = find_groups(model, "", sites, lambda m: run_model(m, batches[0], _home(model)))
    by_block: dict[tuple[int, str], list[Site]] = {}
    for i, group in enumerate(found):  # what every decoder block reads of the encoder is not one choice
        for site in group.sites:
            by_block.setdefault((i, site.block), []).append(site)
    return [SiteGroup(tuple(sites)) for sites in by_block.values()]


def _slots(plan: Plan, group: SiteGroup) -> list[Slot]:
    """The group's sites, together where they have the same options and may share one."""
    slots: dict[object, list[str]] = {}
    for site in group.sites:
        specs = tuple(o.layer.weights for o in plan.sites[site.name].options)
        slots.setdefault(specs if plan.fused else (specs, site.name), []).append(site.name)
    return [Slot(tuple(n), tuple(o.layer.weights for o in plan.sites[n[0]].options)) for n in slots.values()]


def _rounding(model: nn.Module, plan: Plan, groups: Sequence[SiteGroup], batches: Sequence[Batch]) -> Rounded:
    """Rounds the groups' weights as the recipe would, with statistics of the full-precision inputs."""
    leaders = {site.name: group.sites[0].name for group in groups for site in group.sites}
    wanted: dict[str, tuple[Stat, ...]] = {}
    for name, leader in leaders.items():
        if needs := of_inputs(plan.sites[name].recipe.needs):
            wanted[leader] = tuple(dict.fromkeys((*wanted.get(leader, ()), *needs)))
    originals = {name: float_weight(model.get_submodule(name), plan.sites[name].site) for name in leaders}

    def run(module: nn.Module, i: int) -> object:
        return run_model(module, batches[i], _home(model))

    two_streams = any(s.two_streams for stats in wanted.values() for s in stats)  # both are full precision here
    stats: Stats = collect(model, run, batches, wanted, (model, run) if two_streams else None) if wanted else {}

    gradients = fisher_states(model, batches, {name: plan.sites[name].recipe.needs for name in leaders})

    @torch.no_grad()
    def rounded(name: str, spec: Spec) -> Tensor:
        of_site = {**stats.get(leaders[name], {}), **gradients.get(name, {})} or None
        return solve(_option(plan, name, spec), originals[name], of_site).q.dequantize()

    return rounded


def _option(plan: Plan, name: str, spec: Spec) -> SitePlan:
    return next(o for o in plan.sites[name].options if o.layer.weights == spec)


def _home(model: nn.Module) -> torch.device:
    return next(p.device for p in model.parameters())
