"""The loop: units with calls of their own; for each block capture -> rewrite -> solve -> install -> write -> run on.

One block is on the compute device at a time. A finished block is written at once, so a run that was killed resumes
where it was, with the same bytes in the end.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import Recording, collect, record, run_model
from hf_quant.coverage import excused, matches, missed_by, unreached
from hf_quant.diffusion.features import Features, features_of, store_features
from hf_quant.diffusion.timesteps import Timed
from hf_quant.errors import CalibrationError
from hf_quant.groups import find_groups, inside
from hf_quant.install import install
from hf_quant.learning.fisher import fisher_states, of_inputs
from hf_quant.learning.tuning import Surroundings, floating, tune, updated
from hf_quant.ledger import site_bits
from hf_quant.plan import Plan, SitePlan, with_weights
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry
from hf_quant.rewriting.rewrite import float_weight
from hf_quant.rewriting.transforming import Transforming
from hf_quant.running.distributed import reduce_states, union
from hf_quant.running.memo import Memo
from hf_quant.running.progress import track
from hf_quant.running.run_dir import RunDir
from hf_quant.sites import SiteGroup, covering
from hf_quant.solve import Solved, Split, solve_on
from hf_quant.stages.sampler import Batch
from hf_quant.stages.tuner import Tuner, Unit
from hf_quant.stats import Stat, State


@dataclass(slots=True, eq=False)
class Loop:
    """Quantizes the sites of a plan, in place: early units, blocks in order of execution, the rest, late units."""

    model: nn.Module
    recipe: Recipe
    job: Job
    plan: Plan
    batches: list[Batch]
    run_dir: RunDir
    gradients: dict[str, dict[Stat, State]] = field(default_factory=dict)  # of sites that want them, before any change
    floats: dict[str, nn.Module] = field(default_factory=dict)  # every site's float layer, when a wide unit needs them
    early: dict[str, nn.Module] = field(default_factory=dict)  # float layers of what was done before the blocks
    gone: dict[str, Entry] = field(default_factory=dict)  # of parameters that stored features made needless
    timed: Timed | None = None  # when input ranges depend on the timestep

    def run(self) -> list[Entry]:
        """Units with calls of their own, every block in order, sites outside all blocks, units that span several."""
        entries: list[Entry] = []
        wanted = {p.site.name: p.recipe.needs for p in self.plan.sites.values() if p.recipe.needs}
        self.gradients = reduce_states(fisher_states(self.model, self.batches, wanted))
        if self.plan.late or self.plan.early:
            names = [n for p in self.plan.sites.values() for n in (p.site.name, *p.shares)]
            self.floats = {name: self.model.get_submodule(name) for name in names}
        with torch.no_grad():
            for site in [p for p in self.plan.sites.values() if p.site.kind == "embedding"]:
                entries += self._finish_data_free(site.site.name, [site])
            if self.batches and self.plan.blocks:
                entries += self._calibrated_blocks()
            else:
                entries += self._early_units()
                for block in self._track(self.plan.blocks):
                    entries += self._finish_data_free(block, self.plan.in_block(block))
            entries += self._outside()
            for unit in track(self.plan.late, description="tuning", enabled=self.job.progress and bool(self.plan.late)):
                entries = self._late(unit, entries)
        self.plan = replace(self.plan, kept=tuple(self.gone.get(e.name, e) for e in self.plan.kept))
        return [self.gone.get(e.name, e) for e in entries]

    # ---- blocks -------------------------------------------------------------------------------------------------

    def _calibrated_blocks(self) -> Iterator[Entry]:
        device = self._device()
        fp_recording = self._record()
        self._refuse_unreached(fp_recording)
        run = {name for chain in fp_recording.chains for name in chain}
        for name in self.plan.blocks:
            if name not in run:  # all of it was allowed by name, or is kept
                yield from self._finish_data_free(name, self.plan.in_block(name))
        yield from self._early_units()
        recording = fp_recording
        changed = bool(self.early) or any(p.site.kind == "embedding" for p in self.plan.sites.values())
        progress = iter(self._track(self.plan.blocks))
        for chain in fp_recording.chains:
            if changed:
                recording = self._record()
            hidden = [r[chain[0]] for r in recording.starts]
            twins = [r[chain[0]] for r in fp_recording.starts]
            for name in chain:
                next(progress)
                yield from self._block(name, recording, fp_recording, hidden, twins, device)
            changed = True
        next(progress, None)

    def _record(self) -> Recording:
        sites = [p.site.name for p in self.plan.sites.values() if p.recipe.needs or p.recipe.tuner]
        return record(self.model, self.plan.blocks, self.batches, self._home(), sites)

    def refuse_unreached(self) -> None:
        """Stop before any work when the data misses sites: all of them at once, not one a night."""
        self._refuse_unreached(self._record())

    def _refuse_unreached(self, recording: Recording) -> None:
        reached = union(recording.reached | {name for chain in recording.chains for name in chain})
        sites = self.plan.sites
        missed = [n for n, p in sites.items() if missed_by(p, reached) and not excused(p, self.job)]
        if missed:
            raise CalibrationError(unreached(covering(missed, sites)))

    def _block(
        self,
        name: str,
        recording: Recording,
        fp_recording: Recording,
        hidden: list[Tensor],
        twins: list[Tensor],
        device: torch.device,
    ) -> list[Entry]:
        """Quantize one block and move `hidden` (quantized stream) and `twins` (full precision) past it."""
        block = self.model.get_submodule(name)
        home = self._home()
        block.to(device)
        plans = [p for p in self.plan.in_block(name) if p.site.name not in self.early]
        early = {n: module for n, module in self.early.items() if n.startswith(f"{name}.")}

        memo = Memo(block)

        def run(module: nn.Module, i: int) -> Tensor:
            if self.timed is not None:
                self.timed.set_to(i)
            with memo.during(i):
                return recording.calls[i][name].run(module, hidden[i], device)

        def run_fp(module: nn.Module, i: int) -> Tensor:
            return fp_recording.calls[i][name].run(module, twins[i], device)

        units = self.plan.inside.get(name, ())
        two_streams = any(s.two_streams for p in plans for s in p.recipe.needs)
        # past the untouched block, before a rewrite or a resumed run changes it
        with floating(self.model, early):
            passed = [run_fp(block, i).to(home) for i in range(len(twins))] if self._two_paths() else twins
            entries = self.run_dir.load(name, block)  # with what was done early, which is put back
        if self.timed is not None:
            self.timed.give(block)
        if entries is None:
            groups = find_groups(block, name, [p.site for p in plans], lambda b: run(b, 0)) if plans else []
            transforming = Transforming(self.model, block, name, run, self.batches, self.plan.sites)
            self.plan = with_weights(self.plan, self.model, transforming.apply(self.recipe, groups))
            with floating(self.model, early):
                fp_block = copy.deepcopy(block) if two_streams else None
            floats = early | {p.site.name: self.model.get_submodule(p.site.name) for p in plans}
            entries = []
            waves = self.recipe.traversal.waves(groups)
            for k, wave in enumerate(waves):
                entries += self._wave(block, name, wave, run, (fp_block, run_fp) if fp_block is not None else None)
                memo.finish(_paths(waves[: k + 1], name), _paths(waves[k + 1 :], name))
            if units:
                memo.forget()
                runs = partial(run, block), partial(run_fp, block)
                around = Surroundings(self.model, floats, *runs, self.batches, device, self.timed)
                for unit in units:
                    entries = updated(entries, tune(unit, self._tuner(), around, self.plan.sites, self.job.seed))
            self.run_dir.save(name, block, entries)
            for module in self.floats.values():
                module.to(home)
        hidden[:] = [run(block, i).to(home) for i in range(len(hidden))]
        twins[:] = passed
        block.to(home)
        return entries

    def _wave(
        self,
        block: nn.Module,
        name: str,
        wave: Sequence[SiteGroup],
        run: Callable[[nn.Module, int], Tensor],
        fp: tuple[nn.Module, Callable[[nn.Module, int], Any]] | None,
    ) -> list[Entry]:
        wanted: dict[str, tuple[Stat, ...]] = {}
        for group in wave:
            needs = dict.fromkeys(s for site in group.sites for s in of_inputs(self.plan.sites[site.name].recipe.needs))
            if needs:
                wanted[inside(group.sites[0].name, name)] = tuple(needs)
        states = reduce_states(collect(block, run, self.batches, wanted, fp)) if wanted else {}
        entries = []
        for group in wave:
            stats = states.get(inside(group.sites[0].name, name))
            plans = [self.plan.sites[site.name] for site in group.sites]
            for plan, split in zip(plans, self._split(plans, self._with_gradients(plans, stats)), strict=True):
                entries.append(self._site(plan, stats, split))
        return entries

    def _split(self, plans: Sequence[SitePlan], stats: dict[Stat, State] | None) -> Sequence[Split | None]:
        """What the splitter takes out of the weights of a group; its sites share one splitter, the base recipe's."""
        splitter = self.recipe.splitter
        if splitter is None or stats is None or any(p.recipe.splitter != splitter for p in plans):
            return [None] * len(plans)
        Ws = [float_weight(self.model.get_submodule(p.site.name), p.site).float() for p in plans]
        first = plans[0].recipe
        return splitter.split(Ws, stats, first.weights, first.inputs, first.range)

    def _site(self, plan: SitePlan, stats: dict[Stat, State] | None, split: Split | None = None) -> Entry:
        site, stats = plan.site, self._with_gradients([plan], stats)
        missed = stats is None and bool(plan.recipe.needs)
        if missed and not excused(plan, self.job):
            raise CalibrationError(unreached([site.name]))
        module = self.model.get_submodule(site.name)
        solved: Solved = solve_on(self.job.device, plan, float_weight(module, site), stats, split)
        layer = install(self.model, plan, solved)
        if self.timed is not None:
            self.timed.give(layer)
        reason = "never reached by calibration: nearest rounding" if missed else solved.entry.reason
        return replace(solved.entry, bits=site_bits(layer), reason=reason)  # with what is done to its input

    def _with_gradients(self, plans: Sequence[SitePlan], stats: dict[Stat, State] | None) -> dict[Stat, State] | None:
        """The statistics of some sites' common input, and of their weights, one above the other."""
        if stats is None and any(of_inputs(p.recipe.needs) for p in plans):
            return None  # never reached
        found = [self.gradients.get(p.site.name, {}) for p in plans]
        shared = [s for s in found[0] if all(s in of for of in found)]
        if not shared:
            return stats
        return {**(stats or {}), **{s: {"square": torch.cat([of[s]["square"] for of in found])} for s in shared}}

    # ---- without data -------------------------------------------------------------------------------------------

    def _finish_data_free(self, unit: str, plans: Sequence[SitePlan]) -> list[Entry]:
        """Sites that need no data, as one unit of the run directory."""
        if not plans:
            return []
        module = self.model.get_submodule(unit)
        finished = self.run_dir.load(unit, module)
        if finished is not None:
            return finished
        entries = [self._site(p, None) for p in plans]
        self.run_dir.save(unit, self.model.get_submodule(unit), entries)
        return entries

    def _outside(self) -> list[Entry]:
        """Linear sites outside every block: their inputs are seen in a forward of the whole model."""
        left = [p for p in self.plan.in_block("") if p.site.name not in self.early]
        return self._by_whole_forwards([p for p in left if p.site.kind != "embedding"])

    def _by_whole_forwards(self, plans: Sequence[SitePlan]) -> list[Entry]:
        if not plans:
            return []
        wanted = {p.site.name: of_inputs(p.recipe.needs) for p in plans if of_inputs(p.recipe.needs)}
        states: dict[str, dict[Stat, State]] = {}
        if wanted:
            run = lambda m, i: run_model(m, self.batches[i], self._home())  # noqa: E731
            states = reduce_states(collect(self.model, run, self.batches, wanted, None))
        return [self._site(p, states.get(p.site.name)) for p in plans]

    # ---- units that span more than a block ----------------------------------------------------------------------

    def _early_units(self) -> list[Entry]:
        """Those that bring their own calls: the blocks are fitted on what these then compute, against the floats."""
        entries: list[Entry] = []
        wanted = self._features()
        shown = self.job.progress and bool(self.plan.early)
        for unit in track(self.plan.early, description="tuning", enabled=shown):
            entries += self._tuned(unit, partial(self._by_whole_forwards, [self.plan.sites[n] for n in unit.sites]))
            self.early.update(unit.sites)
        return entries if wanted is None else entries + self._store(wanted)

    def _features(self) -> Features | None:
        """What layers make of the timestep alone, where it is to be stored."""
        if self.recipe.serving is None:
            return None
        assert self.timed is not None  # noqa: S101  where something is stored by timestep there is a clock
        kept = [*self.job.skip, *(pattern for pattern, own in self.job.overrides.items() if own is None)]
        asked = [name for name, _ in self.model.named_modules() if matches(name, kept)]
        return features_of(self.model, self.recipe.serving, self.timed, asked)

    def _store(self, wanted: Features) -> list[Entry]:
        assert self.recipe.serving is not None  # noqa: S101  see `_features`
        assert self.timed is not None  # noqa: S101
        left = [p for n, p in self.plan.sites.items() if n in wanted.block.sites and n not in self.early]
        self.early |= {p.site.name: self.model.get_submodule(p.site.name) for p in left}
        entries = self._by_whole_forwards(left)
        replaced, changed = store_features(self.model, self.recipe.serving, wanted, self.timed)
        self.early = replaced | self.early  # of what was quantized before, the float layers
        self.gone = {e.name: e for e in changed if e.status == "kept"}
        return entries + [e for e in changed if e.status == "quantized"]

    def _late(self, unit: Unit, entries: list[Entry]) -> list[Entry]:
        """Fit one."""
        by_name = {e.name: e for e in self._tuned(unit, lambda: entries)}
        return [by_name.get(e.name, e) for e in entries]

    def _tuned(self, unit: Unit, solve_first: Callable[[], list[Entry]]) -> list[Entry]:
        """Fit a unit, or take it from the run directory; the entries of its sites."""
        held = nn.ModuleList([unit.sites[name] for name in unit.sites])
        done = self.run_dir.load(f"tuned-{unit.name}", held)
        if done is None:
            entries = solve_first()
            run = lambda i: run_model(self.model, self.batches[i], self._home())  # noqa: E731
            around = Surroundings(self.model, self.floats, run, run, self.batches, self._device(), self.timed)
            tuned = tune(unit, self._tuner(), around, self.plan.sites, self.job.seed)
            done = [e for e in updated(entries, tuned) if e.name.removesuffix(".weight") in tuned]
            held = nn.ModuleList([self.model.get_submodule(name) for name in unit.sites])
            self.run_dir.save(f"tuned-{unit.name}", held, done)
        for name, module in zip(unit.sites, held, strict=True):
            self.model.set_submodule(name, module)
        if self.timed is not None:
            self.timed.give(self.model)
        return done

    def _tuner(self) -> Tuner:
        assert self.recipe.tuner is not None  # noqa: S101  there are units
        return self.recipe.tuner

    def _two_paths(self) -> bool:
        """Whether any block reads full precision's hidden states: all before it must then hand them on."""
        return bool(self.plan.inside) or any(s.two_streams for p in self.plan.sites.values() for s in p.recipe.needs)

    # ---- small things -------------------------------------------------------------------------------------------

    def _home(self) -> torch.device:
        return next(p.device for p in self.model.parameters())

    def _device(self) -> torch.device:
        return self.job.device or self._home()

    def _track(self, blocks: Sequence[str]) -> Iterator[str]:
        return track(blocks, description="quantizing", total=len(blocks), enabled=self.job.progress)


def _paths(waves: Sequence[Sequence[SiteGroup]], block: str) -> list[str]:
    return [inside(site.name, block) for wave in waves for group in wave for site in group.sites]
