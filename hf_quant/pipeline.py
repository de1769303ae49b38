"""The loop: plan, record, and for each block capture -> rewrite -> solve -> install -> write -> run on.

One block is on the compute device at a time. A finished block is written at once, so a run that was killed resumes
where it was, with the same bytes in the end.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.allocate import allocate
from hf_quant.capture import Recording, collect, record, run_model
from hf_quant.distributed import my_share, reduce_states, union
from hf_quant.errors import CalibrationError, UnsupportedModel
from hf_quant.fisher import fisher_states, of_inputs
from hf_quant.groups import find_groups
from hf_quant.install import install
from hf_quant.ledger import site_bits
from hf_quant.memo import Memo
from hf_quant.pairs import link
from hf_quant.plan import Plan, SitePlan, make_plan, matches
from hf_quant.progress import track
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry, Report
from hf_quant.resources import peak_bytes, versions
from hf_quant.rewrite import float_weight, fold, producer_rows
from hf_quant.rotate import rotate_whole
from hf_quant.rotated_loss import RotatedLoss
from hf_quant.run_dir import RunDir
from hf_quant.runtime.apart import put_back_floats, take_apart
from hf_quant.sites import SiteGroup, covering, linear_shape
from hf_quant.solve import Solved, Split, solve
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import Diagonal, Online, OnlineTransform, PairTransform, Transform, WholeTransform
from hf_quant.stages.tuner import Tuner, Unit
from hf_quant.stats import Stat, State
from hf_quant.timesteps import Timed, follow_timesteps
from hf_quant.trained import train
from hf_quant.tuning import Surroundings, tune, updated


def quantize(model: nn.Module, recipe: Recipe, job: Job) -> Report:
    """Quantize `model` in place.

    Raises:
        ConfigError, UnsupportedModel, UnsupportedSpec: found while planning; the model is untouched.
        CalibrationError: the data is unusable, or never reached a site that `job.allow` does not name.
        RunError: `job.run_dir` belongs to another job, is locked, or the disk is full; finished blocks are kept.
    """
    started = time.perf_counter()
    _refuse_offloaded(model)
    with _apart(model):
        plan = make_plan(model, recipe, job)
        batches: list[Batch] = []
        if any(not r.data_free for r in (recipe, *(p.recipe for p in plan.sites.values()))):
            batches = recipe.sampler.sample(job.data, job.processor, job.seed, model)
        timed = follow_timesteps(model, recipe, plan, batches)
        with RunDir.open(job.run_dir, model, recipe, job, batches) as run_dir:
            whole = [t for t in recipe.transforms if isinstance(t, WholeTransform)]
            for transform in whole:
                lend = lambda m, body: RotatedLoss(m, body, plan.sites, batches)  # noqa: E731
                rotate_whole(model, plan.blocks, transform, batches, job.seed, lend)
            if whole:
                plan = make_plan(model, recipe, job)  # what was tied may no longer be
            floats = {n: model.get_submodule(n) for n, p in plan.sites.items()} if recipe.trainer else {}
            loop = _Loop(model, recipe, job, plan, my_share(batches), run_dir)
            loop.timed = replace(timed, batches=loop.batches) if timed else None
            if recipe.allocator is not None and plan.is_open:
                loop.refuse_unreached()
                loop.plan = allocate(model, recipe.allocator, plan, job, batches, run_dir)
            entries = loop.run()
            training: dict[str, float] = {}
            if recipe.trainer is not None:
                entries, training = train(model, recipe.trainer, loop.plan, floats, batches, job, entries)
    return Report(
        method={},
        coverage=tuple(entries) + plan.kept,
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


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """In eval mode, every matrix a layer of its own; afterwards what was not quantized is as it was."""
    was_training = model.training
    model.eval()
    take_apart(model)
    try:
        yield
    finally:
        put_back_floats(model)
        model.train(was_training)


def describe_batches(batches: Sequence[Batch], job: Job) -> dict[str, Any]:
    """Source, seed, samples, tokens and fingerprint of the calibration data; empty when none was used."""
    if not batches:
        return {}
    from hf_quant.calibration import describe, fingerprint

    first = [next(iter(b.values())) for b in batches]
    return {
        "source": "made up" if job.data is None else describe(job.data),
        "seed": job.seed,
        "samples": sum(len(x) for x in first),
        "tokens": sum(x.numel() for x in first) if not first[0].is_floating_point() else None,
        "fingerprint": fingerprint(batches),
    }


@dataclass(slots=True, eq=False)
class _Loop:
    model: nn.Module
    recipe: Recipe
    job: Job
    plan: Plan
    batches: list[Batch]
    run_dir: RunDir
    gradients: dict[str, dict[Stat, State]] = field(default_factory=dict)  # of sites that want them, before any change
    floats: dict[str, nn.Module] = field(default_factory=dict)  # every site's float layer, when a late unit needs them
    timed: Timed | None = None  # when input ranges depend on the timestep

    def run(self) -> list[Entry]:
        """Every block in order, then the sites outside all blocks, then units that span several."""
        entries: list[Entry] = []
        wanted = {p.site.name: p.recipe.needs for p in self.plan.sites.values() if p.recipe.needs}
        self.gradients = reduce_states(fisher_states(self.model, self.batches, wanted))
        if self.plan.late:
            names = [n for p in self.plan.sites.values() for n in (p.site.name, *p.shares)]
            self.floats = {name: self.model.get_submodule(name) for name in names}
        with torch.no_grad():
            for site in [p for p in self.plan.sites.values() if p.site.kind == "embedding"]:
                entries += self._finish_data_free(site.site.name, [site])
            if self.batches and self.plan.blocks:
                entries += self._calibrated_blocks()
            else:
                for block in self._track(self.plan.blocks):
                    entries += self._finish_data_free(block, self.plan.in_block(block))
            entries += self._outside()
            for unit in track(self.plan.late, description="tuning", enabled=self.job.progress and bool(self.plan.late)):
                entries = self._late(unit, entries)
        return entries

    # ---- blocks -------------------------------------------------------------------------------------------------

    def _calibrated_blocks(self) -> Iterator[Entry]:
        device = self._device()
        fp_recording = self._record()
        self._refuse_unreached(union(fp_recording.reached))
        run = {name for chain in fp_recording.chains for name in chain}
        for name in self.plan.blocks:
            if name not in run:  # all of it was allowed by name, or is kept
                yield from self._finish_data_free(name, self.plan.in_block(name))
        recording, changed = fp_recording, any(p.site.kind == "embedding" for p in self.plan.sites.values())
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
        self._refuse_unreached(union(self._record().reached))

    def _refuse_unreached(self, reached: set[str]) -> None:
        planned = {p.site.name: p for p in self.plan.sites.values() if p.recipe.needs or p.recipe.tuner}
        missed = [n for n, p in planned.items() if n not in reached and not self._excused(p)]
        if missed:
            raise CalibrationError(_unreached(covering(missed, planned)))

    def _excused(self, plan: SitePlan) -> bool:
        """Whether the user allows nearest rounding; a static range of inputs nobody saw cannot be allowed."""
        static = plan.recipe.inputs is not None and plan.recipe.inputs.stored
        return matches(plan.site.name, self.job.allow) and not static

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
        plans = self.plan.in_block(name)

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
        passed = [run_fp(block, i).to(home) for i in range(len(twins))] if self._two_paths() else twins
        entries = self.run_dir.load(name, block)
        if self.timed is not None:
            self.timed.give(block)
        if entries is None:
            groups = find_groups(block, name, [p.site for p in plans], lambda b: run(b, 0)) if plans else []
            self._transform(block, name, groups, run)
            fp_block = copy.deepcopy(block) if two_streams else None
            floats = {p.site.name: self.model.get_submodule(p.site.name) for p in plans}
            entries = []
            waves = self.recipe.traversal.waves(groups)
            for k, wave in enumerate(waves):
                entries += self._wave(block, name, wave, run, (fp_block, run_fp) if fp_block is not None else None)
                memo.finish(_paths(waves[: k + 1], name), _paths(waves[k + 1 :], name))
            if units:
                memo.forget()
                around = Surroundings(
                    self.model, floats, lambda i: run(block, i), lambda i: run_fp(block, i), self.batches, device
                )
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
                wanted[_inside(group.sites[0].name, name)] = tuple(needs)
        states = reduce_states(collect(block, run, self.batches, wanted, fp)) if wanted else {}
        entries = []
        for group in wave:
            stats = states.get(_inside(group.sites[0].name, name))
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

    def _transform(
        self, block: nn.Module, name: str, groups: Sequence[SiteGroup], run: Callable[[nn.Module, int], Tensor]
    ) -> None:
        """Let every transform look at every group with a producer; verify that the block still computes the same."""
        transforms = [t for t in self.recipe.transforms if not isinstance(t, WholeTransform)]
        if not transforms or not groups:
            return
        before = run(block, 0)
        groups = link(groups, block, name, lambda b: run(b, 0))
        for transform in transforms:
            for _ in range(ROUNDS if isinstance(transform, PairTransform) else 1):
                if not self._transform_once(block, name, groups, run, transform):
                    break
        drift = float((run(block, 0) - before).float().norm() / before.float().norm().clamp_min(1e-12))
        if drift > TOLERANCE[before.dtype]:
            raise UnsupportedModel(
                f"the rewrite changed what block {name} computes (relative drift {drift:.2e}): this architecture "
                "uses a norm's output in a way that cannot be seen; use a method without a transform, such as gptq"
            )

    def _transform_once(
        self,
        block: nn.Module,
        name: str,
        groups: Sequence[SiteGroup],
        run: Callable[[nn.Module, int], Tensor],
        transform: Transform | PairTransform | OnlineTransform,
    ) -> bool:
        """Offer every group that it can rewrite to a transform; whether it rewrote one."""
        able = [g for g in groups if isinstance(transform, OnlineTransform) or g.producer is not None]
        if isinstance(transform, PairTransform):
            able = [g for g in able if linear_shape(self.model.get_submodule(str(g.producer))) is not None]
        wanted = {_inside(g.sites[0].name, name): transform.needs for g in able}
        states = reduce_states(collect(block, run, self.batches, wanted, None)) if transform.needs else {}
        rewrote = False
        for group in able:
            stats = states.get(_inside(group.sites[0].name, name), None if transform.needs else {})
            if stats is None:
                continue
            recipe = self.plan.sites[group.sites[0].name].recipe
            Ws = [float_weight(self.model.get_submodule(s.name), s).float() for s in group.sites]
            rewrite: Diagonal | Online | None
            if isinstance(transform, PairTransform):
                rows = producer_rows(self.model, group)
                rewrite = transform.pair(rows, Ws, stats, recipe.weights, recipe.inputs, self.recipe.range)
            elif isinstance(transform, OnlineTransform):
                rewrite = transform.online(Ws, stats, recipe.weights, recipe.inputs, self.recipe.range)
            else:
                rewrite = transform.propose(Ws, stats, recipe.weights, recipe.inputs, self.recipe.range)
            if rewrite is not None:
                fold(self.model, group, rewrite)
                rewrote = True
        return rewrote

    def _site(self, plan: SitePlan, stats: dict[Stat, State] | None, split: Split | None = None) -> Entry:
        site, stats = plan.site, self._with_gradients([plan], stats)
        missed = stats is None and bool(plan.recipe.needs)
        if missed and not self._excused(plan):
            raise CalibrationError(_unreached([site.name]))
        module = self.model.get_submodule(site.name)
        solved: Solved = solve(plan, float_weight(module, site), stats, split)
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
        plans = [p for p in self.plan.in_block("") if p.site.kind != "embedding"]
        if not plans:
            return []
        wanted = {p.site.name: of_inputs(p.recipe.needs) for p in plans if of_inputs(p.recipe.needs)}
        states: dict[str, dict[Stat, State]] = {}
        if wanted:
            run = lambda m, i: run_model(m, self.batches[i], self._home())  # noqa: E731
            states = reduce_states(collect(self.model, run, self.batches, wanted, None))
        return [self._site(p, states.get(p.site.name)) for p in plans]

    # ---- units that span more than a block ----------------------------------------------------------------------

    def _late(self, unit: Unit, entries: list[Entry]) -> list[Entry]:
        """Fit one, or take it from the run directory."""
        held = nn.ModuleList([unit.sites[name] for name in unit.sites])
        done = self.run_dir.load(f"tuned-{unit.name}", held)
        if done is None:
            run = lambda i: run_model(self.model, self.batches[i], self._home())  # noqa: E731
            around = Surroundings(self.model, self.floats, run, run, self.batches, self._device())
            tuned = tune(unit, self._tuner(), around, self.plan.sites, self.job.seed)
            done = [e for e in updated(entries, tuned) if e.name.removesuffix(".weight") in tuned]
            held = nn.ModuleList([self.model.get_submodule(name) for name in unit.sites])
            self.run_dir.save(f"tuned-{unit.name}", held, done)
        for name, module in zip(unit.sites, held, strict=True):
            self.model.set_submodule(name, module)
        by_name = {e.name: e for e in done}
        return [by_name.get(e.name, e) for e in entries]

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


ROUNDS = 50  # of a transform of pairs: chains of layers settle in a few
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


def _unreached(globs: Sequence[str]) -> str:
    named = ", ".join(f'"{g}"' for g in globs)
    return (
        f"no calibration token ever reached {', '.join(globs)}. Use more or other calibration data (for a vision "
        f"tower: batches with images), keep these layers in full precision with skip=[{named}], or, unless their "
        f"inputs have a static range, round them to nearest with allow=[{named}]"
    )


def _paths(waves: Sequence[Sequence[SiteGroup]], block: str) -> list[str]:
    return [_inside(site.name, block) for wave in waves for group in wave for site in group.sites]


def _inside(name: str, block: str) -> str:
    return name.removeprefix(block).removeprefix(".")
