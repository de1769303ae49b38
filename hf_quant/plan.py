"""Plan: what will be done to every parameter, decided and checked before any work begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import floor, prod

from torch import nn

from hf_quant.allocation.budget import Budget
from hf_quant.coverage import coverage, matches, small_bits, tied_otherwise, ties, untied_bits
from hf_quant.errors import ConfigError, UnsupportedModel, UnsupportedSpec
from hf_quant.formats import Layer, PackedFormat, format_for, format_named
from hf_quant.method import did_you_mean
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry
from hf_quant.running.distributed import processes
from hf_quant.sites import Site, find_blocks, kept_reason, walk
from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch
from hf_quant.stages.solver import Nearest
from hf_quant.stages.tuner import Chain, Unit


@dataclass(frozen=True, slots=True, eq=False)
class SitePlan:
    """One site, the recipe for it, and the format that will hold it."""

    site: Site
    recipe: Recipe
    layer: Layer
    format: PackedFormat
    shares: tuple[str, ...] = ()  # of an embedding: the modules tied to it, which will share the packed table
    options: tuple["SitePlan", ...] = ()  # what an allocator may choose instead, by rising size; none: it is fixed

    @property
    def bits(self) -> int:
        """Bits its canonical tensors will take."""
        return sum(prod(shape) * dtype.itemsize * 8 for shape, dtype in self.format.layout(self.layer).values())


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Every site with its recipe, and an entry for every parameter that stays as it is.

    Of the units that a tuner fits, those that bring their own calls are fitted before the blocks, which then see what
    they compute (`early`); those inside a block when that block is solved (`inside`); those that span more of the model
    when all of it is (`late`).
    """

    blocks: tuple[str, ...]
    sites: Mapping[str, SitePlan]
    kept: tuple[Entry, ...]
    small_bits: int = 0  # of what is stored besides and has no entry: biases, small norms, buffers
    budget: Budget | None = None
    inside: Mapping[str, tuple[Unit, ...]] = field(default_factory=dict)
    late: tuple[Unit, ...] = ()
    early: tuple[Unit, ...] = ()

    def in_block(self, block: str) -> list[SitePlan]:
        """The plans of the sites in this block ("" for those outside every block), in module order."""
        return [p for p in self.sites.values() if p.site.block == block]

    @property
    def values(self) -> int:
        """How many weights are quantized."""
        return sum(prod(p.site.shape) for p in self.sites.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight."""
        return sum(p.bits for p in self.sites.values()) / self.values if self.sites else 0.0

    @property
    def model_bits(self) -> int:
        """Bits of the quantized model's tensors, kept ones included."""
        return sum(p.bits for p in self.sites.values()) + sum(e.bits for e in self.kept) + self.small_bits

    @property
    def model_bytes(self) -> int:
        """Bytes of the quantized model's tensors, kept ones included."""
        return self.model_bits // 8

    # ---- with a budget ------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether an allocator has yet to choose for some site."""
        return any(p.options for p in self.sites.values())

    def choose(self, chosen: Mapping[str, SitePlan]) -> "Plan":
        """The plan with some sites done otherwise, and nothing left open."""
        sites = {name: replace(chosen.get(name, p), options=()) for name, p in self.sites.items()}
        return replace(self, sites=sites)

    @property
    def lowest(self) -> "Plan":
        """Every open site at its smallest."""
        return self.choose({name: p.options[0] for name, p in self.sites.items() if p.options})

    @property
    def highest(self) -> "Plan":
        """Every open site at its largest."""
        return self.choose({name: p.options[-1] for name, p in self.sites.items() if p.options})

    @property
    def open_bits(self) -> int:
        """Bits of the open sites as the recipe's own weights have them."""
        return sum(p.bits for p in self.sites.values() if p.options)

    @property
    def room(self) -> int:
        """Bits that the open sites may take together; without a budget what they would take anyway."""
        if self.budget is None:
            return self.open_bits
        if self.budget.bits is not None:
            fixed = sum(p.bits for p in self.sites.values()) - self.open_bits
            return floor(self.budget.bits * self.values) - fixed
        return 8 * (self.budget.bytes or 0) - (self.model_bits - self.open_bits)

    @property
    def fused(self) -> bool:
        """Whether sites that read the same tensor get one choice."""
        return self.budget is None or self.budget.fused

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.bits_per_weight:.3f} bits a weight ({self.model_bytes} bytes in all)"


def make_plan(model: nn.Module, recipe: Recipe, job: Job) -> Plan:
    """Decide for every parameter of the model (which may be on the meta device).

    Raises:
        ConfigError: a skip, override or allow pattern matches nothing.
        UnsupportedModel: nothing to quantize, or a parameter nobody knows how to treat and `job.allow` does not name.
        UnsupportedSpec: a solver or a format refuses a site; all such sites are listed.
    """
    _refuse_unrun(recipe, job)
    found = list(walk(model))
    named = [s.name for s in found]
    others = tied_otherwise(model)
    chosen = _overrides(named, job)
    tied = ties(model)
    for end, table in tied.items():  # one matrix: whichever end is named, all are quantized
        if end in chosen:
            chosen.setdefault(table, chosen.pop(end))
    for pattern in job.skip:
        if not any(fnmatchcase(n, pattern) for n in named):
            raise ConfigError(f"skip pattern {pattern!r} matches no layer{_wider(pattern, named)}")
    sites: dict[str, SitePlan] = {}
    reasons: dict[str, str] = {}
    problems: list[str] = []
    for site in found:
        if site.name in tied:
            continue
        kept = "skipped by the user" if matches(site.name, job.skip) else kept_reason(site.name)
        if partner := others.get(site.name):
            kept = kept or f"shares its weight with {partner}"
        if site.kind == "embedding" and site.name not in chosen:
            kept = kept or "embedding; name it in overrides to quantize it"
        if site.name in chosen:
            own = chosen[site.name]
            kept = "kept by an override" if own is None else None
        else:
            own = recipe
        if kept is not None or own is None:
            reasons[site.name] = kept or "kept"
            continue
        try:
            shares = tuple(end for end, table in tied.items() if table == site.name)
            sites[site.name] = _site_plan(model, site, own, shares)
            _refuse_one_stream(sites[site.name])
        except UnsupportedSpec as error:
            problems.append(f"{site.name}: {error}")
    if problems:
        raise UnsupportedSpec("; ".join(problems))
    if not sites:
        raise UnsupportedModel(
            "there is nothing to quantize: no linear layer is left after skip, overrides and defaults"
        )
    rest = coverage(model, sites, reasons, job)
    budget = recipe.allocator.budget if recipe.allocator else None
    small = small_bits(model, sites, rest) + untied_bits(model, recipe)
    plan = Plan(tuple(find_blocks(model)), sites, rest, small, budget)
    _refuse_unreachable(plan)
    return with_units(plan, model, recipe, ())


def _refuse_unreachable(plan: Plan) -> None:
    if plan.budget is not None and not plan.is_open:
        raise UnsupportedSpec(f"budget {plan.budget.size}: the overrides leave no layer whose bits could be chosen")
    if not plan.is_open or sum(p.options[0].bits for p in plan.sites.values() if p.options) <= plan.room:
        return
    reach = f"this model gets {plan.lowest.size} at the least and {plan.highest.size} at the most"
    if plan.budget is None:
        raise UnsupportedSpec(f"no width to choose from is as small as the method's own bits: {reach}; raise bits")
    raise UnsupportedSpec(
        f"the budget of {plan.budget.size} cannot be met: {reach}. Raise the budget, allow smaller widths "
        "(budget={'size': ..., 'widths': [...]}) or larger groups, or quantize more (overrides for embeddings)"
    )


def _refuse_unrun(recipe: Recipe, job: Job) -> None:
    """A stage that the loop does not run yet must not be passed over in silence."""
    if recipe.cache is not None:
        raise UnsupportedSpec("the recipe has a cache, which the loop does not run yet")
    if recipe.serving is not None and recipe.transforms:
        raise UnsupportedSpec("features are stored as the model computes them: the recipe cannot have transforms too")
    for pattern, other in job.overrides.items():
        if other is not None and other.serving not in (None, recipe.serving):
            raise UnsupportedSpec(f"the override {pattern!r} stores features otherwise than the rest of the model")
        if other is not None and other.trainer not in (None, recipe.trainer):
            raise UnsupportedSpec(
                f"the override {pattern!r} trains otherwise than the rest, and there is one training of the whole "
                "model: give it the same method and arguments (bits and group_size may differ), or one without training"
            )
    if recipe.trainer is None:
        return
    for stage in ("transforms", "splitter", "repairs"):
        if getattr(recipe, stage):
            raise UnsupportedSpec(f"a trainer works on the weights as they are: the recipe cannot have {stage} too")


def with_weights(plan: Plan, model: nn.Module, specs: Mapping[str, Spec]) -> Plan:
    """The plan with the weights of some sites quantized otherwise.

    Raises:
        UnsupportedSpec: a solver or every format refuses one.
    """
    changed = {n: (plan.sites[n], replace(plan.sites[n].recipe, weights=spec)) for n, spec in specs.items()}
    sites = {n: _site_plan(model, old.site, recipe, old.shares) for n, (old, recipe) in changed.items()}
    return replace(plan, sites={**plan.sites, **sites})


def with_units(plan: Plan, model: nn.Module, recipe: Recipe, batches: Sequence[Batch]) -> Plan:
    """The plan with the units of the recipe's tuner, which may look at the data."""
    if recipe.tuner is None:
        return plan
    sites = plan.sites
    if processes() > 1:
        raise UnsupportedSpec(
            "blocks are fitted against all of the data: run it in one process, or without those steps"
        )
    if recipe.splitter is not None or recipe.repairs:
        raise UnsupportedSpec("a tuner cannot fit codes beside branches: use it without a splitter and repairs")
    mine = [p.site for p in sites.values() if p.recipe.tuner is not None and p.site.kind != "embedding"]
    if other := [s.name for s in mine if sites[s.name].recipe.tuner != recipe.tuner]:
        raise UnsupportedSpec(f"{other[0]}: an override cannot bring a tuner of its own; give it the same settings")
    inside: dict[str, tuple[Unit, ...]] = {}
    late: list[Unit] = []
    units = recipe.units.units(model, plan.blocks, mine, batches)
    early = [u for u in units if u.calls is not None]
    for unit in [u for u in units if u.calls is None]:
        where = {sites[name].site.block for name in unit.sites}
        block = where.pop() if len(where) == 1 else ""
        if block and any(m is unit.module for m in model.get_submodule(block).modules()):
            inside[block] = (*inside.get(block, ()), unit)
        else:
            late.append(unit)
    if not units:
        raise UnsupportedSpec(f"{type(recipe.units).__name__} finds nothing to fit in this model")
    wide = early + late
    if wide and recipe.transforms:
        raise UnsupportedSpec(f"unit {wide[0].name} spans more than a block, which a transform does not allow yet")
    if recipe.tuner.loss.gradients and any(not isinstance(u.module, Chain) for u in wide):
        raise UnsupportedSpec(f"{type(recipe.tuner.loss).__name__} weighs outputs inside a model: use units of blocks")
    if two := [n for u in early for n in u.sites if any(s.two_streams for s in sites[n].recipe.needs)]:
        raise UnsupportedSpec(f"{two[0]}: fitted before the blocks, where there is no second stream for its solver yet")
    return replace(plan, inside=inside, late=tuple(late), early=tuple(early))


def _site_plan(model: nn.Module, site: Site, recipe: Recipe, shares: tuple[str, ...]) -> SitePlan:
    if site.kind == "embedding":  # a lookup has no activations to calibrate on
        plain = {"objective": None, "solver": Nearest(), "splitter": None, "grids": None, "repairs": (), "inputs": None}
        plain["tuner"] = None
        recipe = replace(recipe, **plain)  # type: ignore[arg-type]
    if recipe.allocator is not None:
        return _open_plan(model, site, recipe, shares)
    layer = Layer(site.shape, recipe.weights, recipe.inputs)
    refusal = recipe.solver.refuses(recipe.weights)
    if refusal:
        raise UnsupportedSpec(f"{type(recipe.solver).__name__}: {refusal}")
    if recipe.tuner is not None and (refusal := recipe.tuner.refuses(recipe.weights, recipe.inputs)):
        raise UnsupportedSpec(f"{type(recipe.tuner).__name__}: {refusal}")
    if recipe.trainer is not None and (refusal := recipe.trainer.refuses(model, layer)):
        raise UnsupportedSpec(f"{type(recipe.trainer).__name__}: {refusal}")
    if recipe.format is None:
        return SitePlan(site, recipe, layer, format_for(layer), shares)
    fmt = format_named(recipe.format)
    if reason := fmt.holds(layer):
        raise UnsupportedSpec(f"{fmt.id}: {reason}")
    return SitePlan(site, recipe, layer, fmt, shares)


def _refuse_one_stream(plan: SitePlan) -> None:
    """A method that compares two streams token by token needs the one in full precision, which blocks have."""
    if plan.site.block == "" and any(stat.two_streams for stat in plan.recipe.needs):
        raise UnsupportedSpec(
            "the method compares the layer's inputs with those on the full-precision path, and there is none outside "
            f'the blocks; give it another method, overrides={{"{plan.site.name}": {{"method": "gptq"}}}}, or skip it'
        )


def _open_plan(model: nn.Module, site: Site, recipe: Recipe, shares: tuple[str, ...]) -> SitePlan:
    """A site whose spec an allocator chooses, of those that its solver and some format take."""
    assert recipe.allocator is not None  # noqa: S101  called for such recipes
    plain = replace(recipe, allocator=None)
    options: list[SitePlan] = []
    refusals: list[str] = []
    for spec in recipe.allocator.choices:
        try:
            options.append(_site_plan(model, site, replace(plain, weights=spec), shares))
        except UnsupportedSpec as error:
            refusals.append(str(error))
    if not options:
        raise UnsupportedSpec("none of the widths to choose from: " + "; ".join(dict.fromkeys(refusals)))
    return replace(_site_plan(model, site, plain, shares), options=tuple(sorted(options, key=lambda o: o.bits)))


def _overrides(names: Sequence[str], job: Job) -> dict[str, Recipe | None]:
    """Site name -> the recipe of the first pattern that matches it."""
    chosen: dict[str, Recipe | None] = {}
    for pattern, own in job.overrides.items():
        hits = [n for n in names if fnmatchcase(n, pattern)]
        if not hits:
            raise ConfigError(f"override pattern {pattern!r} matches no layer{_wider(pattern, names)}")
        for name in hits:
            chosen.setdefault(name, own)
    return chosen


def _wider(pattern: str, names: Sequence[str]) -> str:
    """What to try instead: a glob matches whole names, so the end or the beginning of one matches nothing."""
    bare = pattern.removesuffix(".weight")
    for wider in (bare, f"*.{bare}", f"{bare}.*", f"*.{bare}.*"):
        if any(fnmatchcase(n, wider) for n in names):
            return f", did you mean {wider!r}?"
    return did_you_mean(pattern, names)
