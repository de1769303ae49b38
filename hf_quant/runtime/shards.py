"""Shards: can the packed tensors of a layer be cut for tensor parallelism? Asked of the format by trying."""

import re
from functools import cache

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.formats import Layer, PackedFormat, format_named
from hf_quant.runtime.experts import Experts
from hf_quant.runtime.packed import Packed, refit

STYLES = {"colwise": 0, "rowwise": 1}  # axis of [N, K] that is cut


def adapt_plan(model: nn.Module, plan: dict[str, str], parts: int) -> None:
    """Fit transformers' tensor parallel plan (wildcard name -> style) to a quantized model, in place.

    Experts taken apart are computed whole by every rank: their rules are of the fused module, and are dropped.

    Raises:
        UnsupportedModel: naming the first layer that the plan would cut wrongly.
    """
    experts = {_wildcard(name) for name, module in model.named_modules() if isinstance(module, Experts)}
    for key in [k for k in plan if any(k == e or k.startswith(f"{e}.") for e in experts)]:
        del plan[key]
    for name, module in model.named_modules():
        style = plan.get(_wildcard(name))
        if parts > 1 and style is not None and style != "replicate" and isinstance(module, Packed):
            reason = refuses(module, style, parts)
            if reason is not None:
                raise UnsupportedModel(
                    f"{name} cannot be cut into {parts} for tensor parallelism ({style}): {reason}; quantize with a "
                    "smaller group_size, use fewer ranks, or load with a device_map"
                )


def _wildcard(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def refuses(module: Packed, style: str, parts: int) -> str | None:
    """None when cutting every packed tensor gives `parts` layers that are the cuts of the weight, else why not.

    transformers cuts a 2-D tensor along its rows (colwise, and variants that gather the output) or columns (rowwise),
    and a 1-D one along its only axis.
    """
    style = style.partition("_")[0]
    if style not in STYLES:
        return f"{style!r} is neither colwise nor rowwise"
    extras = [
        n
        for n, _ in module.named_parameters(recurse=False)
        if n.startswith(("lr_", "sparse_", "pre_scale", "shift", "offset"))
    ]
    if getattr(module, "rotation", None) is not None:
        extras.append("a rotated input")
    if module.layer.inputs is not None and module.layer.inputs.power != 1:
        extras.append("the scales of the input's columns")
    if extras:
        return f"{', '.join(extras)} cannot be cut the same way as the codes"
    with torch.device("cpu"):  # models are built inside torch.device("meta")
        return _tried(module.format.id, module.layer, STYLES[style], parts)


@cache
def _tried(format_id: str, layer: Layer, axis: int, parts: int) -> str | None:
    fmt, (n, k) = format_named(format_id), layer.shape
    if fmt.layout(layer).keys() != fmt.weight_layout(layer).keys():
        return "the static input range is one value for all"
    if layer.shape[axis] % parts:
        return f"{layer.shape[axis]} {'columns' if axis else 'rows'} do not divide into {parts}"
    # the other axis may be short: what is cut along one axis does not depend on the extent of the other
    shape = (min(n, 64), k) if axis else (n, min(k, 512))
    W_NK = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = fmt.pack(refit(W_NK, layer.weights))
    want = fmt.weight(whole, Layer(shape, layer.weights), torch.float32).chunk(parts, axis)
    for rank, cut in enumerate(want):
        reason = _cut(fmt, whole, Layer((cut.shape[0], cut.shape[1]), layer.weights), axis, parts, rank, cut)
        if reason is not None:
            return reason
    return None


def _cut(
    fmt: PackedFormat, whole: dict[str, Tensor], layer: Layer, axis: int, parts: int, rank: int, want: Tensor
) -> str | None:
    local: dict[str, Tensor] = {}
    for name, (shape, _) in fmt.weight_layout(layer).items():
        dim = axis if whole[name].dim() == 2 else 0
        pieces = whole[name].chunk(parts, dim)
        if rank >= len(pieces) or tuple(pieces[rank].shape) != shape:
            return f"{name} {list(whole[name].shape)} does not cut into {parts} along axis {dim}"
        local[name] = pieces[rank]
    same = torch.equal(fmt.weight(local, layer, torch.float32), want)
    return None if same else "groups or packed words straddle the cut"
