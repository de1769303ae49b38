"""Solve one site: float weight and statistics in, packed layer and its entry in the report out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import PluginError, UnsupportedModel, UnsupportedSpec
from hf_quant.formats import Layer
from hf_quant.hadamard import Hadamard
from hf_quant.plan import SitePlan
from hf_quant.qtensor import QTensor, row_slices, with_outer, without_outer
from hf_quant.report import Entry
from hf_quant.runtime.branches import Branch, Constant
from hf_quant.spec import Spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stats import Stats

FittedRange = tuple[Tensor, Tensor | None]  # (scale, zero), each [entries, 1]
Split = tuple[Tensor, tuple[Branch, ...]]  # what is left to round, and the branches


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What solving a site gives: codes, branches beside them, the spec and range of its input, the report."""

    q: QTensor
    branches: tuple[Branch, ...]
    inputs: Spec | None
    input_range: FittedRange | None
    entry: Entry


def solve_on(
    device: torch.device | None, plan: SitePlan, W_NK: Tensor, stats: Stats | None = None, split: Split | None = None
) -> Solved:
    """Solve a weight where `device` says, for a layer that stays where it is; with statistics, where they are."""
    if device is None or device == W_NK.device or stats is not None or split is not None:
        return solve(plan, W_NK, stats, split)
    solved: Solved = moved(solve(plan, W_NK.to(device), None), W_NK.device)
    return solved


def moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401  what was given
    """A solved weight, or a part of it, with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Solved | QTensor | Branch):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@torch.no_grad()
def solve(plan: SitePlan, W_NK: Tensor, stats: Stats | None, split: Split | None = None) -> Solved:
    """Solve and repair one weight.

    Args:
        plan: the site and its recipe.
        W_NK: the float weight.
        split: what the recipe's splitter made of it, if there is one.
        stats: statistics of its input; None when none were captured, and then the codes are the nearest ones.

    Raises:
        UnsupportedModel: the weight holds NaN or infinite values.
        PluginError: what the solver returns is not this weight, quantized as the spec says.
        UnsupportedSpec: the recipe's choice of grids is not what the planned format holds.
    """
    started = time.perf_counter()
    recipe, spec, inputs = plan.recipe, plan.recipe.weights, plan.recipe.inputs
    if not all(bool(torch.isfinite(W_NK[rows]).all()) for rows in row_slices(W_NK.shape)):
        raise UnsupportedModel(
            f"the weight of {plan.site.name} holds NaN or infinite values; the checkpoint is damaged"
        )
    quadratic = None
    if recipe.objective is not None:
        unit = torch.eye(W_NK.shape[1], device=W_NK.device)
        quadratic = recipe.objective.quadratic(stats) if stats else Quadratic(unit)
    # without statistics nothing needs a whole float32 copy, and quantizing on load must not take the room for one
    rest, branches = split if split is not None else (W_NK if quadratic is None else W_NK.float(), ())
    if recipe.grids is not None and stats:
        spec, inputs = recipe.grids.choose(rest.float(), stats, spec, inputs)
        if reason := plan.format.holds(Layer(plan.site.shape, spec, inputs)):
            raise UnsupportedSpec(f"{plan.site.name}: {type(recipe.grids).__name__} chose what is not stored: {reason}")
    inner, inner_spec, outer = without_outer(rest, spec)
    version = inner._version
    q = recipe.solver.solve(inner, inner_spec, recipe.range, rotated(quadratic, spec.rotation))
    flaw = q.flaw(plan.site.shape, inner_spec) if isinstance(q, QTensor) else f"it is {type(q).__name__}, no QTensor"
    if inner._version != version:
        flaw = "it wrote into the weight it was given"
    if flaw:
        raise PluginError(f"{type(recipe.solver).__name__}, of {plan.site.name}: {flaw}")
    q = with_outer(q, spec, outer)
    for repair in recipe.repairs:
        branches += repair.repair(rest.float(), q, stats or {})
    input_range = None
    if inputs is not None and inputs.stored and stats:
        input_range = recipe.input_range.fit_inputs(stats, inputs)
    of_output = stats and quadratic is not None and quadratic.F_NK is None
    error = relative_error(W_NK, q, branches, quadratic if of_output else None)
    kept = [t.to(W_NK.dtype) if t.is_floating_point() else t for b in branches for t in b.tensors]  # as installed
    bits = plan.bits + sum(8 * t.numel() * t.element_size() for t in kept)
    entry = Entry(
        name=plan.site.name + ".weight",
        shape=plan.site.shape,
        status="quantized",
        format=plan.format.id,
        bits=bits,
        error=error,
        error_of="output" if of_output else "weight",
        seconds=round(time.perf_counter() - started, 4),
        spec=q.spec.to_json(),
        inputs=inputs.to_json() if inputs is not None else None,
    )
    return Solved(q, branches, inputs, input_range, entry)


def rotated(quadratic: Quadratic | None, rotation: Hadamard | None) -> Quadratic | None:
    """The same error for the rotated weight `W R`: `R^T H R` and `R^T D R`; weights of their own have no such form."""
    if quadratic is None or rotation is None:
        return quadratic

    def both(M_KK: Tensor) -> Tensor:
        return rotation.apply(rotation.apply(M_KK).T.contiguous()).T.contiguous()

    return Quadratic(both(quadratic.H_KK), None if quadratic.D_KK is None else both(quadratic.D_KK))


def relative_error(W_NK: Tensor, q: QTensor, branches: tuple[Branch, ...], quadratic: Quadratic | None) -> float:
    """`tr(E H E^T) / tr(W H W^T)` with `E = W - Q - branches`; H is the identity when unknown."""
    above = below = 0.0
    for rows, part in q.slices():
        W = W_NK[rows].float()
        E = W - part.dequantize()
        for branch in branches:
            if not isinstance(branch, Constant):
                E = E - branch.matrix(rows)
        above += _size(E, quadratic)
        below += _size(W, quadratic)
    return above / below if below > 0 else 0.0


def _size(M_NK: Tensor, quadratic: Quadratic | None) -> float:
    """`tr(M H M^T)`."""
    return float(M_NK.square().sum() if quadratic is None else (M_NK @ quadratic.H_KK * M_NK).sum())
