"""Features: what layers make of the timestep (and class) alone, in full precision, and its place in their stead."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import to_device
from hf_quant.diffusion.temporal import CONDITIONS, TemporalBlock, temporal_block
from hf_quant.diffusion.timesteps import Timed
from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, format_for
from hf_quant.ledger import site_bits
from hf_quant.report import Entry
from hf_quant.runtime.clock import CLASSES
from hf_quant.runtime.features import FeatureTable, Vacant
from hf_quant.runtime.packed import refit
from hf_quant.sites import outputs_of
from hf_quant.stages.serving import Serving

_log = logging.getLogger("hf_quant")


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Of a network in full precision.

    Attributes:
        block: its temporal part.
        classes: those of the data, ascending; none of a network that takes none.
        wanted: layer -> what it puts out, `[entries, classes, N]`.
    """

    block: TemporalBlock
    classes: tuple[int, ...]
    wanted: Mapping[str, Tensor]


def features_of(
    model: nn.Module, serving: Serving, timed: Timed, asked: Collection[str] = (), like: Features | None = None
) -> Features | None:
    """What is to be stored, None when there are too many classes; of the layers that `like` has, when it is given.

    Args:
        model: in full precision, or as quantized as it is to be looked at.
        serving: how many classes are too many.
        timed: the clock, batches, and classes that will be asked for.
        asked: layers that stay as they are.

    Raises:
        UnsupportedModel: no layer depends on the timestep alone.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    found = temporal_block(model, layers, timed.batches[0])
    if found is None or not found.storable:
        raise UnsupportedModel(f"no layer of {type(model).__name__} depends on its timestep alone: nothing to store")
    classes = _classes(found, timed)
    if len(classes) > serving.classes:
        _log.warning(
            "%d classes are more than the %d whose features are stored: the layers are kept",
            len(classes),
            serving.classes,
        )
        return None
    names = [n for n in found.storable if n not in asked] if like is None else list(like.wanted)
    steps, parts = timed.clock.steps, dict[str, list[Tensor]]()
    every = torch.cartesian_prod(torch.tensor(steps).double(), torch.tensor(classes or [0]).double())
    device = next(model.parameters()).device
    for rows in torch.cat([every, every[-1:].expand(-len(every) % found.rows, -1)]).split(found.rows):
        given = {n: rows[:, i].to(timed.batches[0][n].dtype) for i, n in enumerate(CONDITIONS) if n in found.given}
        timed.clock.set_to(rows[:, 0], rows[:, 1].long() if classes else None)
        with torch.no_grad():
            out = found.features(**to_device(given, device))
        for name in names:
            parts.setdefault(name, []).append(out[name].flatten(1).float().cpu())
    shape = len(steps), max(1, len(classes)), -1
    return Features(found, classes, {n: torch.cat(p)[: len(every)].reshape(shape) for n, p in parts.items()})


def _classes(block: TemporalBlock, timed: Timed) -> tuple[int, ...]:
    """Those that were named, and those that guidance adds."""
    if CLASSES not in block.given:
        return ()
    seen = torch.cat([b[CLASSES].reshape(-1).cpu() for b in timed.batches]).unique().tolist()
    return tuple(sorted({*seen, *timed.classes}))


def store_features(
    model: nn.Module, serving: Serving, features: Features, timed: Timed
) -> tuple[dict[str, nn.Module], list[Entry]]:
    """Put tables where they serve better, and nothing where nothing is needed; what stood there, and entries for it."""
    own = features_of(model, serving, timed, like=features)
    assert own is not None  # noqa: S101  the same data as before
    timed.clock.classes = features.classes
    replaced: dict[str, nn.Module] = {}
    entries: list[Entry] = []
    stored: list[str] = []
    for name, wanted in features.wanted.items():
        V = refit(wanted.flatten(0, 1), serving.values)
        keeps = serving.keeps(wanted, V.dequantize().reshape(wanted.shape), own.wanted[name])
        if bool(keeps.all()):
            continue
        layer: Any = model.get_submodule(name)
        inner = layer if bool(keeps.any()) else None
        table = FeatureTable.from_qtensor(
            V,
            format_for(Layer(V.shape, V.spec)),
            clock=timed.clock,
            own=tuple(keeps.nonzero().flatten().tolist()),
            inner=inner,
            dtype=layer.weight.dtype,
        )
        replaced[name] = layer
        model.set_submodule(name, table.to(layer.weight.device).train(layer.training))
        entries.append(_entry(name, table, wanted, V.dequantize()))
        if inner is None:
            stored.append(name)
            entries.append(_gone(name, layer, "its outputs are stored"))
    for name in features.block.needless(stored):
        layer = replaced[name] = model.get_submodule(name)
        model.set_submodule(name, Vacant(outputs_of_any(layer)))
        entries.append(_gone(name, layer, "nothing reads it any more: features are stored"))
    return replaced, entries


def outputs_of_any(layer: nn.Module) -> int:
    """As `outputs_of`, of quantized layers too."""
    return int(layer.out_features) if isinstance(layer, nn.Linear) else outputs_of(layer)


def _entry(name: str, table: FeatureTable, wanted: Tensor, values: Tensor) -> Entry:
    off = (values - wanted.flatten(0, 1)).square().sum() / wanted.square().sum().clamp_min(1e-30)
    shown = f"its outputs, for {wanted.shape[0]} timesteps and {wanted.shape[1]} classes"
    own = f"; {len(table.own)} of the timesteps are computed" if table.own else ""
    return Entry(
        name=f"{name}.features",
        shape=table.layer.shape,
        status="quantized",
        reason=shown + own,
        format=table.format.id,
        bits=site_bits(table),
        error=float(off),
        error_of="output",
        spec=table.layer.weights.to_json(),
    )


def _gone(name: str, layer: nn.Module, reason: str) -> Entry:
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101  a linear layer's, or an embedding's
    return Entry(name=f"{name}.weight", shape=tuple(weight.shape), status="kept", reason=f"gone: {reason}")
