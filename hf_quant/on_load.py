"""On load: quantize each weight the moment it is read from disk, for methods that need no data."""

import copy
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.install import install
from hf_quant.plan import Plan, SitePlan, make_plan
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry, Report
from hf_quant.running.resources import peak_bytes, release_freed, require_device, versions
from hf_quant.runtime.apart import can_take_apart, stand_in_for, take_apart
from hf_quant.runtime.stand_in import StandIn
from hf_quant.solve import solve_on


def plan_on_load(model: nn.Module, recipe: Recipe, job: Job) -> Plan | None:
    """The plan for a model whose weights are still on disk; None when the recipe needs data or the whole model.

    The model itself stays whole, as the loader knows it; the plan is made on a twin that is taken apart.

    Raises:
        ConfigError: there is no such device as `job.device`.
    """
    require_device(job.device)
    twin = copy.deepcopy(model)  # on the meta device: no bytes are copied
    take_apart(twin)
    plan = make_plan(twin, recipe, job)
    alone = not recipe.transforms and recipe.allocator is None and all(p.recipe.data_free for p in plan.sites.values())
    return plan if alone else None


def wants(model: nn.Module, plan: Plan, parameter: str) -> bool:
    """Whether `install_loaded` takes this parameter: a site's weight, or anything of a module that is taken apart."""
    owner, _, leaf = parameter.rpartition(".")
    if leaf == "weight" and owner in plan.sites:
        return True
    module = model.get_submodule(owner)
    return (can_take_apart(module) or isinstance(module, StandIn)) and any(
        s.startswith(owner + ".") for s in plan.sites
    )


def tied_to(plan: Plan | None, parameter: str) -> list[str]:
    """Names of the parameters that come with this one, because they share its matrix."""
    site = None if plan is None else plan.sites.get(parameter.removesuffix(".weight"))
    return [] if site is None else [f"{name}.weight" for name in site.shares]


@torch.no_grad()
def install_loaded(
    model: nn.Module,
    plan: Plan,
    parameter: str,
    value: Tensor,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> list[Entry]:
    """Quantize a float parameter that was just read, and put the packed layer where the float one was to be.

    Args:
        parameter: its name in the model.
        value: what was read, in the checkpoint's layout.
        dtype: compute type of the layer.
        device: where it is quantized; None: where it was read to, which is where the layer is in any case.
    """
    entries = _install_loaded(model, plan, parameter, value, dtype, device)
    release_freed()
    return entries


def _install_loaded(
    model: nn.Module, plan: Plan, parameter: str, value: Tensor, dtype: torch.dtype, device: torch.device | None
) -> list[Entry]:
    owner, _, leaf = parameter.rpartition(".")
    if owner in plan.sites:
        site = plan.sites[owner]
        return [_install(model, site, value.T if site.site.kind == "conv1d" else value, dtype, device)]
    if can_take_apart(model.get_submodule(owner)):
        model.set_submodule(owner, stand_in_for(model.get_submodule(owner)))
    apart = model.get_submodule(owner)
    assert isinstance(apart, StandIn)  # noqa: S101  `wants` has seen to it
    entries = []
    for member, part, tensor in apart.members(leaf, value):
        name = f"{owner}.{member}"
        if part == "weight" and name in plan.sites:
            entries.append(_install(model, plan.sites[name], tensor, dtype, device))
        else:
            loaded = _loaded(nn.Parameter(tensor.to(dtype), requires_grad=False))
            setattr(model.get_submodule(name), part, loaded)
    return entries


def _install(model: nn.Module, site: SitePlan, W_NK: Tensor, dtype: torch.dtype, device: torch.device | None) -> Entry:
    solved = solve_on(device, site, W_NK)
    release_freed()
    for tensor in install(model, site, solved, dtype).parameters(recurse=False):
        if tensor.device.type != "meta":
            _loaded(tensor)
    return solved.entry


def _loaded(tensor: nn.Parameter) -> nn.Parameter:
    """Tell transformers' weight initialization to leave it alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def report_loaded(plan: Plan, entries: Mapping[str, Entry], started: float) -> Report:
    """The report of a model quantized while it was loaded.

    Raises:
        UnsupportedModel: the checkpoint did not hold a weight that was to be quantized.
    """
    missing = [name for name in plan.sites if f"{name}.weight" not in entries]
    if missing:
        raise UnsupportedModel(f"the checkpoint holds no weight for {', '.join(missing[:5])}; is it complete?")
    ordered = tuple(entries[f"{name}.weight"] for name in plan.sites)
    return Report(
        method={},
        coverage=ordered + plan.kept,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
        versions=versions(),
    )
