"""Foreseen: what stored features will take, told from shapes: the network runs once on the meta device."""

import inspect
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.diffusion.drawing import classes_of
from hf_quant.diffusion.features import outputs_of_any
from hf_quant.diffusion.temporal import TemporalBlock, temporal_block
from hf_quant.formats import Layer, format_for
from hf_quant.plan import Plan
from hf_quant.runtime.clock import CLASSES, NAME
from hf_quant.stages.serving import Serving


def with_features(model: nn.Module, plan: Plan, serving: Serving) -> dict[str, Any] | None:
    """`bits_per_weight` and `model_bytes` if every timestep is stored, of as many classes as there can be.

    None where the network takes more than samples, timesteps and classes, so that it cannot be run for its shapes.

    Args:
        model: on the meta device, taken apart.
        plan: of its layers as they would be without.
        serving: what is to be stored.
    """
    block = _temporal(model)
    if block is None:
        return None
    kept = {e.name.rpartition(".")[0] for e in plan.kept if e.reason.startswith("asked")}
    names = [n for n in block.storable if n not in kept]
    classes = min(serving.classes, classes_of(model) or 1) if CLASSES in block.given else 1
    stored = [Layer((serving.entries * classes, outputs_of_any(model.get_submodule(n))), serving.values) for n in names]
    gone = {*names, *block.needless(names)}
    sites = [p for n, p in plan.sites.items() if n not in gone]
    tables = sum(prod(s) * d.itemsize * 8 for la in stored for s, d in format_for(la).layout(la).values())
    bits = sum(p.bits for p in sites) + tables
    weights = sum(prod(p.site.shape) for p in sites) + sum(prod(layer.shape) for layer in stored)
    rest = [e.bits for e in plan.kept if e.name.rpartition(".")[0] not in gone]
    counted = {f"{n}.weight" for n in plan.sites} | {e.name for e in plan.kept}
    small = plan.small_bits - sum(
        8 * p.numel() * p.element_size()
        for n in gone
        for own, p in model.get_submodule(n).named_parameters(n)
        if own not in counted
    )
    return {"bits_per_weight": bits / weights, "model_bytes": (bits + sum(rest) + small) // 8}


def _temporal(model: nn.Module) -> TemporalBlock | None:
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    for batch in _batches(model):
        try:
            return temporal_block(model, layers, batch)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants classes, or what nobody knows here
            continue
    return None


def _batches(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """One sample, without a class and with one."""
    config: Any = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if not isinstance(size, int) or not isinstance(channels, int):
        return
    first = list(inspect.signature(type(model).forward).parameters)[1]
    plain = {first: torch.empty(1, channels, size, size, device="meta"), NAME: torch.zeros(1, device="meta")}
    yield plain
    yield {**plain, CLASSES: torch.zeros(1, dtype=torch.long, device="meta")}
