"""Rewrite: fold what a transform proposes into the float weights, without changing what the block computes.

Everything is computed in float64 and rounded once to the type of the weights.
"""

from collections.abc import Callable, Sequence
from inspect import signature

import torch
from torch import Tensor, nn

from hf_quant.errors import PluginError, UnsupportedModel
from hf_quant.runtime.rotating import scale_input, shift_input
from hf_quant.sites import Site, SiteGroup
from hf_quant.stages.transform import Diagonal, Online

Map = Callable[[Tensor], Tensor]  # in float64


def float_weight(module: nn.Module, site: Site) -> Tensor:
    """The site's weight as `W_NK` (a view for Conv1D, whose storage is transposed)."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    return weight.T if site.kind == "conv1d" else weight


@torch.no_grad()
def fold(model: nn.Module, group: SiteGroup, rewrite: Diagonal | Online) -> None:
    """Apply a rewrite in place: the producer's output channels divided by s, the readers' input channels times s.

    What is done while the model runs (a `Diagonal`, where there is no producer) is hooked to the readers until
    quantized layers do it.

    Raises:
        UnsupportedModel: the producer or a reader cannot take its part.
    """
    if isinstance(rewrite, Online):
        for site in group.sites:
            shift_input(model.get_submodule(site.name), rewrite.shift_K)
        return
    if not isinstance(rewrite, Diagonal):
        raise PluginError(f"{type(rewrite).__name__}, of the input of {group.sites[0].name}, is no rewrite")
    if not bool(torch.isfinite(rewrite.s_K).all() and (rewrite.s_K > 0).all()):
        raise UnsupportedModel(f"scales for the input of {group.sites[0].name} are not finite and positive")
    if group.producer is None:
        for site in group.sites:
            module = model.get_submodule(site.name)
            scale_input(module, rewrite.s_K)
            if rewrite.z_K is not None:
                shift_input(module, -rewrite.z_K / rewrite.s_K)
        return
    producer = model.get_submodule(group.producer)
    readers = [model.get_submodule(site.name) for site in group.sites]
    s_C = _of_producer(rewrite.s_K.double().log(), group).exp()
    if rewrite.z_K is not None:
        z_C = _of_producer(rewrite.z_K.double(), group)
        _shift(group, producer, readers, z_C)
    s_C = scale_outputs(group.producer, producer, s_C)
    s_K = _of_reader(s_C, group)
    for reader in readers:
        map_inputs(reader, lambda W: W * s_K)


def producer_rows(model: nn.Module, group: SiteGroup) -> Tensor:
    """The producer's weight in float32, a row for each input channel of the group."""
    weight = weight_of(model.get_submodule(str(group.producer))).float().flatten(1)
    return weight if group.channels is None else weight[group.channels.to(weight.device)]


def _of_producer(values_K: Tensor, group: SiteGroup) -> Tensor:
    """Mean over the input channels that carry the same output channel."""
    if group.channels is None:
        return values_K
    channels = group.channels.to(values_K.device)
    size = int(channels.max()) + 1
    count = torch.zeros(size, dtype=values_K.dtype, device=values_K.device).index_add_(
        0, channels, torch.ones_like(values_K)
    )
    return torch.zeros_like(count).index_add_(0, channels, values_K) / count


def _of_reader(values_C: Tensor, group: SiteGroup) -> Tensor:
    return values_C if group.channels is None else values_C[group.channels.to(values_C.device)]


def _shift(group: SiteGroup, producer: nn.Module, readers: Sequence[nn.Module], z_C: Tensor) -> None:
    """The producer's bias less z, and `W z` into the readers' biases: `s` is still to be applied to both."""
    bias = getattr(producer, "bias", None)
    if not isinstance(bias, Tensor) or any(not isinstance(r.bias, Tensor) for r in readers):
        raise UnsupportedModel(f"{group.producer} or a layer that reads it has no bias to take a shift")
    _set(bias, bias.double() - z_C)
    for reader in readers:
        add_bias(reader, weight_of(reader).double() @ _of_reader(z_C, group))


def scale_outputs(name: str, module: nn.Module, s_C: Tensor) -> Tensor:
    """Divide the output channels of a layer or norm by s; returns the s that the rounded weights really have."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    if weight.dim() == 1 and weight.numel() == s_C.numel():
        offset = norm_offset(module)
        before = weight.double() + offset
        _set(weight, before / s_C - offset)
        after = weight.double() + offset  # rounded to the weight's type: what the readers must really make up for
        s_C = torch.where(after != 0, before / after, s_C)
    elif weight.dim() > 1 and weight_of(module).shape[0] == s_C.numel():
        map_outputs(module, lambda W_NK: W_NK / s_C[:, None])
        return s_C
    else:
        raise UnsupportedModel(f"{name} ({type(module).__name__}) cannot take a per-channel scale")
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        _set(bias, bias.double() / s_C)
    return s_C


def weight_of(module: nn.Module) -> Tensor:
    """The weight with outputs first: `[N, K]`, or `[N, K, ...]` of a convolution; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    return weight.T if type(module).__name__ == "Conv1D" else weight


def map_outputs(module: nn.Module, of: Map) -> None:
    """Replace a layer's map by another of the same outputs: `of` is applied to W `[N, *]`, and to b as `[N, 1]`."""
    weight = weight_of(module)
    _set(weight, of(weight.double().flatten(1)).reshape(weight.shape))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        _set(bias, of(bias.double()[:, None])[:, 0])


def map_inputs(module: nn.Module, of: Map) -> None:
    """Apply `of` to W with its input channels last."""
    weight = weight_of(module)
    _set(weight, of(weight.double().movedim(1, -1)).movedim(-1, 1))


def add_bias(module: nn.Module, b_N: Tensor) -> None:
    """`b += b_N`."""
    bias = module.bias
    assert isinstance(bias, Tensor)  # noqa: S101  whoever asks has looked
    _set(bias, bias.double() + b_N)


def norm_offset(norm: nn.Module) -> float:
    """1.0 when the norm multiplies by (1 + weight), as Gemma's, else 0.0: told by what it does."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)  # noqa: S101
    probe = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=torch.float32)[None]
    saved = weight.detach().clone()
    try:
        weight.data.zero_()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            return 0.0
        takes = signature(norm.forward).parameters.values()
        required = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in takes)
        out = norm(*[probe.to(weight.dtype)] * max(1, required))  # a gate may come with the input
        if isinstance(bias, Tensor):
            out = out - bias
        return 1.0 if bool(out.abs().max() > 0) else 0.0
    finally:
        weight.data.copy_(saved)


@torch.no_grad()
def fold_norm(name: str, norm: nn.Module, readers: Sequence[nn.Module]) -> None:
    """Move a norm's gain and bias into the layers that read it: it then only normalizes.

    A bias that a reader has no place for stays in the norm, divided by the gain.

    Raises:
        UnsupportedModel: it would have to, and a gain is zero.
    """
    gain, beta = norm.weight, getattr(norm, "bias", None)
    if not isinstance(gain, Tensor):
        return
    offset = norm_offset(norm)
    g_K = gain.double() + offset
    if isinstance(beta, Tensor) and bool(beta.any()):
        if all(isinstance(r.bias, Tensor) for r in readers):
            for reader in readers:
                add_bias(reader, weight_of(reader).double() @ beta.double())
            beta.data.zero_()
        elif bool((g_K == 0).any()):
            raise UnsupportedModel(f"{name} has gains of zero and a bias that the layers after it cannot take")
        else:
            _set(beta, beta.double() / g_K)
    for reader in readers:
        map_inputs(reader, lambda W: W * g_K)
    gain.data.fill_(1 - offset)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value.to(parameter.dtype))
