"""Coverage: what becomes of the parameters that are no site's, which weights are tied, and what all of it takes."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_quant.errors import UnsupportedModel
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry
from hf_quant.sites import covering, linear_shape
from hf_quant.stages.transform import WholeTransform

if TYPE_CHECKING:
    from hf_quant.plan import SitePlan

SMALL = 1024  # parameters up to this many elements are not worth a line in the coverage


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the globs."""
    return any(fnmatchcase(name, p) for p in patterns)


def unreached(globs: Sequence[str]) -> str:
    """What to tell who calibrates with data that misses these sites."""
    named = ", ".join(f'"{g}"' for g in globs)
    return (
        f"no calibration token ever reached {', '.join(globs)}. Use more or other calibration data (for a vision "
        f"tower: batches with images), keep these layers in full precision with skip=[{named}], or, unless their "
        f"inputs have a static range, round them to nearest with allow=[{named}]"
    )


def missed_by(plan: "SitePlan", reached: Collection[str]) -> bool:
    """Whether calibration does not reach what a site needs of it; for transforms alone its block is enough."""
    if plan.recipe.needs or plan.recipe.tuner:
        return plan.site.name not in reached
    return bool(plan.recipe.transform_needs and plan.site.block) and plan.site.block not in reached


def excused(plan: "SitePlan", job: Job) -> bool:
    """Whether the user allows nearest rounding; a static range of inputs nobody saw cannot be allowed."""
    static = plan.recipe.inputs is not None and plan.recipe.inputs.stored
    return matches(plan.site.name, job.allow) and not static


def ties(model: nn.Module) -> dict[str, str]:
    """Module -> embedding, for every linear layer and every other embedding that shares an embedding's weight."""
    found = {}
    for end, table in _tied_modules(model).items():
        module = model.get_submodule(end)
        takes_part = linear_shape(module) is not None or isinstance(module, nn.Embedding)
        if takes_part and isinstance(model.get_submodule(table), nn.Embedding):
            found[end] = table
    return found


def _tied_modules(model: nn.Module) -> dict[str, str]:
    """Module -> the module whose weight it shares."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    weights = {a: b for a, b in keys.items() if a.endswith(".weight") and b.endswith(".weight")}
    return {a.removesuffix(".weight"): b.removesuffix(".weight") for a, b in weights.items()}


def tied_otherwise(model: nn.Module) -> dict[str, str]:
    """Module -> module of every tie that is not to an embedding, both ways round."""
    tied = ties(model)
    rest = {a: b for a, b in _tied_modules(model).items() if a not in tied}
    return rest | {b: a for a, b in rest.items()}


def coverage(model: nn.Module, sites: Collection[str], reasons: Mapping[str, str], job: Job) -> tuple[Entry, ...]:
    """An entry for every parameter that is no site's.

    Args:
        model: it may be on the meta device.
        sites: names of what is quantized.
        reasons: module -> why it is kept, for those that someone decided about.
        job: whose `allow` names what nobody knows how to treat.

    Raises:
        UnsupportedModel: it does not name all of that.
    """
    entries: list[Entry] = []
    unknown: list[str] = []
    tied = getattr(model, "all_tied_weights_keys", {})  # listed once, under the name they are saved with
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.numel() <= SMALL or (owner in sites and name.endswith(".weight")) or name in tied:
            continue
        reason = reasons.get(owner) or _reason(name, model.get_submodule(owner), parameter)
        bits = parameter.numel() * parameter.element_size() * 8
        if reason is None:
            if not (matches(name, job.allow) or matches(owner, job.allow)):
                unknown.append(f"{name} {tuple(parameter.shape)} in {type(model.get_submodule(owner)).__name__}")
            entries.append(
                _entry(name, parameter, "unsupported", "no stage can quantize it yet; allowed by name", bits)
            )
        else:
            entries.append(_entry(name, parameter, "kept", reason, bits))
    if unknown:
        globs = covering([u.split()[0] for u in unknown], [name for name, _ in model.named_parameters()])
        raise UnsupportedModel(
            "these parameters would stay in full precision because nothing here can quantize them: "
            + "; ".join(unknown)
            + f". To go on without: allow={globs}"
        )
    return tuple(entries)


def small_bits(model: nn.Module, sites: Collection[str], entries: Sequence[Entry]) -> int:
    """Bits of everything stored that is neither a site's weight nor has an entry."""
    known = {e.name for e in entries} | {f"{name}.weight" for name in sites} | {f"{n}.weight" for n in ties(model)}
    stored = {n: p for n, p in model.named_parameters() if n not in known}
    for owner, module in model.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        stored |= {f"{owner}.{n}": b for n in kept if (b := module._buffers[n]) is not None}
    return sum(8 * t.numel() * t.element_size() for t in stored.values())


def untied_bits(model: nn.Module, recipe: Recipe) -> int:
    """Bits of the copies that a rotation of the residual stream makes of tied tables: a budget must foresee them."""
    if not any(isinstance(t, WholeTransform) for t in recipe.transforms):
        return 0
    weights = [model.get_submodule(end).weight for end in ties(model)]
    return sum(8 * w.numel() * w.element_size() for w in weights if isinstance(w, torch.Tensor))


def _entry(name: str, parameter: torch.Tensor, status: str, reason: str, bits: int) -> Entry:
    return Entry(name=name, shape=tuple(parameter.shape), status=status, reason=reason, bits=bits)  # type: ignore[arg-type]


def _reason(name: str, owner: nn.Module, parameter: torch.Tensor) -> str | None:
    """Why a parameter that is no site stays in full precision; None when nobody knows."""
    leaf = name.rpartition(".")[2]
    if parameter.dim() <= 1 or sum(s > 1 for s in parameter.shape) <= 1:
        return "vector (norm, bias or token)"
    if isinstance(owner, nn.Embedding):
        return "embedding; name it in overrides to quantize it"
    if "pos" in leaf or "pos" in type(owner).__name__.lower():
        return "position table"
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d) and leaf == "weight":
        if owner.groups == owner.in_channels:
            return "depthwise convolution"
        if "patch" in name or owner.kernel_size == owner.stride != (1, 1):
            return "patch embedding"
        return None
    if leaf in ("A_log", "D"):
        return "state-space parameter"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if "router" in name.split(".") or "gate" in name.split("."):
        return "router"
    return None
