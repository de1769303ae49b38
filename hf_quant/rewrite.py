"""Rewrite: fold what a transform proposes into the float weights, without changing what the block computes."""

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.sites import Site, SiteGroup
from hf_quant.stages.transform import Diagonal, Rewrite


def float_weight(module: nn.Module, site: Site) -> Tensor:
    """The site's weight as `W_NK` (a view for Conv1D, whose storage is transposed)."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    return weight.T if site.kind == "conv1d" else weight


@torch.no_grad()
def fold(model: nn.Module, group: SiteGroup, rewrite: Rewrite) -> None:
    """Apply a rewrite in place: consumers' columns times s, the producer's output channels divided by s.

    Raises:
        UnsupportedModel: the producer is of a kind that cannot take the inverse.
    """
    assert isinstance(rewrite, Diagonal)  # noqa: S101  the only rewrite there is
    assert group.producer is not None  # noqa: S101  asked for only where there is one
    s_K = rewrite.s_K
    if not bool(torch.isfinite(s_K).all() and (s_K > 0).all()):
        raise UnsupportedModel(f"scales for {group.producer} are not finite and positive")
    producer = model.get_submodule(group.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)  # noqa: S101
    if weight.dim() == 1:
        # Gemma's norm multiplies by (1 + weight); told apart by what it does, not by its name
        offset = _norm_offset(producer, weight)
        before = weight.float() + offset
        weight.copy_((before / s_K - offset).to(weight.dtype))
        after = weight.float() + offset  # rounded to the weight's type: what the consumers must really make up for
        s_K = torch.where(after != 0, before / after, s_K)
    elif weight.dim() == 2 and weight.shape[0] == s_K.numel():
        weight.copy_((weight.float() / s_K[:, None]).to(weight.dtype))
    else:
        raise UnsupportedModel(f"{group.producer} ({type(producer).__name__}) cannot take a per-channel scale")
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.float() / s_K).to(bias.dtype))
    for site in group.sites:
        W_NK = float_weight(model.get_submodule(site.name), site)
        W_NK.copy_((W_NK.float() * s_K).to(W_NK.dtype))


def _norm_offset(norm: nn.Module, weight: Tensor) -> float:
    """1.0 when the norm multiplies by (1 + weight), else 0.0: probed with a constant-free input."""
    probe = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=torch.float32)[None]
    saved = weight.detach().clone()
    try:
        weight.zero_()
        bias = getattr(norm, "bias", None)
        out = norm(probe.to(weight.dtype))
        if isinstance(bias, Tensor):
            out = out - bias
        return 1.0 if bool(out.abs().max() > 0) else 0.0
    finally:
        weight.copy_(saved)
