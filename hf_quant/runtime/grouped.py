"""Grouped: the products of all experts as one node, each row with the weight of its expert.

    y[t C + c] = q(x[t]) W_e^T + b_e,    e the c-th expert of token t

A kernel that groups (`formats.Grouping`) does it in one launch, from blobs stacked by expert. Any other runs once for
each expert that some token chose. Weights of experts that no token chose are not touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.formats import ALONE, Grouping, Layer, PackedFormat, format_named
from hf_quant.products import product
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import local

# what a layer may have besides codes and bias; with any of it every expert runs by itself
EXTRAS = ("pre_scale", "shift", "offset", "lr_down", "lr_up", "sparse_values", "rotation", "clock")
ARGUMENTS = "Tensor[] tensors, Tensor[] blob, str format, str layer, str kernel, int count"


@dataclass(frozen=True, eq=False)
class Group:
    """Layers of one kind, as the operator takes them.

    Attributes:
        blobs: each layer's blob, by which is seen whether the group is still of these layers.
        tensors: canonical tensors, layer after layer; none where `blob` is stacked.
        blob: the layers' blobs, stacked or one after the other.
        fmt: their format.
        layer: what they are.
        kernel: which one runs.
        ready: the device and type it was chosen for.
    """

    blobs: list[list[Tensor]]
    tensors: list[Tensor]
    blob: list[Tensor]
    fmt: PackedFormat
    layer: Layer
    kernel: str
    ready: tuple[torch.device, torch.dtype]

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether it is still what `grouped` would make of the layers."""
        return all(_alone(x) and x.__dict__["_blob"] is b for x, b in zip(layers, self.blobs, strict=True))

    def product(self, x_TK: Tensor, chosen_TC: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        """`[T, K]`, `[T, C]` -> `[T C, N]`; rows whose expert is none of the layers' are their bias, or 0."""
        y: Tensor = torch.ops.hf_quant.experts(
            x_TK,
            chosen_TC,
            self.tensors,
            self.blob,
            self.fmt.id,
            self.layer.key,
            self.kernel,
            len(self.blobs),
        )
        if layers[0].bias is None:
            return y
        bias_EN = torch.stack([local(layer.bias) for layer in layers])  # type: ignore[arg-type]
        return y + bias_EN.to(y.dtype)[chosen_TC.reshape(-1).clamp(0, len(layers) - 1)]


def grouped(layers: Sequence[nn.Module]) -> Group | None:
    """The layers as one group, laid out; None when they have not all one format, shape and kernel, or have extras.

    Stacked blobs are kept by the group, and the layers' own become views of them: codes are in memory once.
    """
    first = layers[0]
    if not all(_alone(layer) for layer in layers):
        return None
    assert isinstance(first, QuantLinear)  # noqa: S101  `_alone`
    of, whole = (first.format, first.kernel, first._ready), first._product()
    for layer in layers:
        assert isinstance(layer, QuantLinear)  # noqa: S101
        if (layer.format, layer.kernel, layer._ready) != of or layer._product() != whole:
            return None
        if layer.factors or any(getattr(layer, name) is not None for name in EXTRAS):
            return None
        layer.lay_out()
    if first._ready is None:
        return None
    blobs: list[list[Tensor]] = [layer._blob for layer in layers]  # type: ignore[misc]
    stored = whole.inputs is not None and whole.inputs.stored
    kinds = {tuple((t.shape, t.dtype) for t in blob) for blob in blobs}
    if first.kernel in first.format.groups and not stored and len(kinds) == 1:
        return Group(blobs, [], _stacked(blobs), first.format, whole, first.kernel, first._ready)
    gone = first.format.replaces.get(first.kernel, ())
    each = [layer._operands(frozenset(), without=gone) for layer in layers]  # type: ignore[operator]
    tensors = [named[name] for named in each for name in sorted(named)]
    return Group(blobs, tensors, [t for b in blobs for t in b], first.format, whole, first.kernel, first._ready)


def _alone(layer: nn.Module) -> bool:
    """Whether nothing but the layer itself says what it computes: no subclass, no hook."""
    if type(layer) is not QuantLinear or "forward" in layer.__dict__:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


@torch.no_grad()
def _stacked(blobs: list[list[Tensor]]) -> list[Tensor]:
    """The blobs by expert; each layer's becomes a view. One tensor of all layers is held twice at a time."""
    stacked = []
    with torch.inference_mode(False):
        for i in range(len(blobs[0])):
            together = torch.stack([blob[i] for blob in blobs])
            for blob, own in zip(blobs, together, strict=True):
                blob[i] = own
            stacked.append(together)
    return stacked


def _each(chosen_TC: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows of the result) of those that were chosen."""
    flat = chosen_TC.reshape(-1)
    for e in flat.unique().tolist():
        if 0 <= e < count:  # expert parallelism marks tokens of other ranks by the number of experts
            yield e, (flat == e).nonzero()[:, 0]


def _of(parts: list[Tensor], e: int, count: int) -> list[Tensor]:
    size = len(parts) // count
    return parts[e * size : (e + 1) * size]


def _experts(
    x: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    blob: list[Tensor],
    format: str,
    layer: str,
    kernel: str,
    count: int,
) -> Tensor:
    fmt, whole = format_named(format), Layer.from_key(layer)
    if not tensors:
        return _grouping(fmt, kernel).grouped(x, chosen, blob, whole)
    y = x.new_zeros(chosen.numel(), whole.shape[0])
    for e, rows in _each(chosen, count):
        token = rows // chosen.shape[1]
        own = _of(tensors, e, count), _of(blob, e, count)
        y[rows] = fmt.op(x[token], *own, layer, kernel, *ALONE.arguments)
    return y


def _backward(
    grad: Tensor,
    chosen: Tensor,
    tensors: list[Tensor],
    blob: list[Tensor],
    format: str,
    layer: str,
    kernel: str,
    count: int,
) -> Tensor:
    fmt, whole = format_named(format), Layer.from_key(layer)
    gone = fmt.replaces.get(kernel, ())
    names = [name for name in sorted(fmt.layout(whole)) if name not in gone]
    result = grad.new_zeros(chosen.numel(), whole.shape[1])
    for e, rows in _each(chosen, count):
        if tensors:
            named = dict(zip(names, _of(tensors, e, count), strict=True))
            named |= fmt.restore(_of(blob, e, count), whole, kernel)
            W_NK = fmt.weight(named, whole, grad.dtype)
        else:
            W_NK = _grouping(fmt, kernel).dense([t[e] for t in blob], whole, grad.dtype)
        result[rows] = product(grad[rows], W_NK.T)
    return result.view(*chosen.shape, whole.shape[1]).sum(1)


def _grouping(fmt: PackedFormat, kernel: str) -> Grouping:
    found = next(k for k in fmt.kernels if k.name == kernel)
    assert isinstance(found, Grouping)  # noqa: S101  `PackedFormat.groups`
    return found


_op = torch.library.custom_op(
    "hf_quant::experts", _experts, mutates_args=(), schema=f"(Tensor x, Tensor chosen, {ARGUMENTS}) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "hf_quant::experts_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor chosen, {ARGUMENTS}) -> Tensor",
)
_op.register_fake(
    lambda x, chosen, tensors, blob, format, layer, kernel, count: x.new_empty(
        chosen.numel(), Layer.from_key(layer).shape[0]
    )
)
_backward_op.register_fake(
    lambda grad, chosen, tensors, blob, format, layer, kernel, count: grad.new_empty(
        chosen.shape[0], Layer.from_key(layer).shape[1]
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch's own signature
    _, chosen, tensors, blob, *ctx.which = inputs
    ctx.save_for_backward(chosen, *tensors, *blob)
    ctx.sizes = len(tensors), len(blob)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    chosen, *held = ctx.saved_tensors
    tensors, blob = ctx.sizes
    grad_TK = _backward_op(grad, chosen, held[:tensors], held[tensors:], *ctx.which)
    return grad_TK, None, [None] * tensors, [None] * blob, None, None, None, None


_op.register_autograd(_gradient, setup_context=_save)
