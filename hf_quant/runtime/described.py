"""A linear layer as JSON: what a checkpoint says of it, and the empty layer that its tensors are then loaded into."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer, format_named
from hf_quant.hadamard import Hadamard
from hf_quant.runtime.activation import timed
from hf_quant.runtime.branches import Sparse, column_type, factor_format, factor_layers
from hf_quant.runtime.clock import Clock
from hf_quant.sites import Kind
from hf_quant.spec import Spec

if TYPE_CHECKING:
    from hf_quant.runtime.linear import QuantLinear

Made = TypeVar("Made")
FIELDS = {
    "format",
    "weights",
    "inputs",
    "rank",
    "rank_weights",
    "pre_scale",
    "sparse",
    "rotation",
    "shift",
    "offset",
    "steps",
}


def describe(layer: "QuantLinear") -> dict[str, Any]:
    """All that `empty` needs besides shape and bias; what most layers lack is named only where it is."""
    inputs = layer.layer.inputs
    return {
        "format": layer.format.id,
        "weights": layer.layer.weights.to_json(),
        "inputs": None if inputs is None else inputs.to_json(),
        "rank": layer.rank,
        "pre_scale": layer.pre_scale is not None,
        **({"rank_weights": layer.factors["lr_up"].weights.to_json()} if layer.factors else {}),
        **({} if layer.sparse_columns is None else {"sparse": len(layer.sparse_columns)}),
        **({} if layer.rotation is None else {"rotation": layer.rotation.to_json()}),
        **({} if layer.shift is None else {"shift": True}),
        **({} if layer.offset is None else {"offset": True}),
        **({} if layer.clock is None else {"steps": list(layer.clock.steps)}),
    }


def empty(
    make: Callable[..., Made],
    data: dict[str, Any],
    shape: tuple[int, int],
    *,
    kind: Kind,
    bias: bool,
    dtype: torch.dtype,
) -> Made:
    """`make` (`QuantLinear`) with the shapes and types of a saved layer, on the meta device.

    Raises:
        CheckpointError: a format that is not known here.
        ConfigError: a spec or rank that is not valid.
    """
    if unknown := set(data) - FIELDS:
        raise ConfigError(f"{sorted(unknown)} are not known here; a newer hf-quant may be needed")
    fmt = format_named(data["format"])
    inputs = None if data["inputs"] is None else Spec.from_json(data["inputs"])
    layer = Layer(shape, Spec.from_json(data["weights"]), inputs)
    (n, k), rank, entries = shape, data["rank"], data.get("sparse", 0)
    if not isinstance(rank, int) or not 0 <= rank <= max(n, k):
        raise ConfigError(f"rank={rank!r}: a low-rank branch of a [{n}, {k}] matrix has 0 to {max(n, k)} terms")
    if not isinstance(entries, int) or not 0 <= entries <= n * k:
        raise ConfigError(f"sparse={entries!r}: a sparse branch of a [{n}, {k}] matrix has 0 to {n * k} entries")
    rotation = None if data.get("rotation") is None else Hadamard.from_json(data["rotation"])
    if rotation is not None and (reason := rotation.refuses(k)):
        raise ConfigError(f"rotation: {reason}")
    clock = Clock(data["steps"]) if timed(inputs) else None
    if clock is not None and inputs is not None and len(clock.steps) != inputs.entries:
        raise ConfigError(f"{len(clock.steps)} steps for a table of {inputs.entries} entries")
    coded = None if data.get("rank_weights") is None else _coded(data["rank_weights"], shape, rank, dtype)

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    indices = meta(n + 1, dtype=torch.int32), meta(entries, dtype=column_type(k))
    return make(
        fmt,
        layer,
        {name: meta(*size, dtype=stored) for name, (size, stored) in fmt.layout(layer).items()},
        dtype=dtype,
        kind=kind,
        bias=meta(n) if bias else None,
        pre_scale=meta(k) if data["pre_scale"] else None,
        lr_down=meta(rank, k) if rank and coded is None else None,
        lr_up=meta(n, rank) if rank and coded is None else None,
        coded=coded,
        sparse=Sparse(*indices, meta(entries), k) if entries else None,
        rotation=rotation,
        shift=meta(k) if data.get("shift") else None,
        offset=meta(n) if data.get("offset") else None,
        clock=clock,
    )


def _coded(
    weights: Any,  # noqa: ANN401  JSON
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The factors of a coded low-rank branch and their empty tensors; scales have the layer's type."""
    factors = factor_layers(shape, rank, Spec.from_json(weights))
    if reason := next((r for f in factors.values() if (r := factor_format().holds(f))), None):
        raise ConfigError(f"rank_weights: {reason}")
    layouts = {name: factor_format().weight_layout(factor) for name, factor in factors.items()}
    return factors, {
        f"{name}_{key}": torch.empty(size, dtype=dtype if stored.is_floating_point else stored, device="meta")
        for name, layout in layouts.items()
        for key, (size, stored) in layout.items()
    }
