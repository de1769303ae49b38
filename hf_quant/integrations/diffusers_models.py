"""What diffusers does with weights without asking a quantizer, and how packed ones take part in it."""

import logging
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from hf_quant.checkpoint import packed_modules
from hf_quant.runtime.conv import as_leaves
from hf_quant.runtime.packed import Packed, expose_logical_weights
from hf_quant.runtime.stand_in import StandIn

_log = logging.getLogger("hf_quant")


def adapt(model: nn.Module) -> None:
    """Prepare a model with packed layers for casting, offloading, `fuse_lora` and, of Flux, for `load_lora_weights`.

    Layerwise casting leaves packed layers alone: they are smaller than in 8-bit floats already, and their biases and
    scales would lose precision without a word. A convolution's stand-in is a convolution to it, and is left alone too.
    """
    anything: Any = model
    stand_ins = {n for n, m in model.named_modules() if isinstance(m, StandIn) and _holds_packed(m)}
    names = stand_ins | {name for name, _ in packed_modules(model)}
    packed = tuple(f"^{re.escape(name)}$" for name in sorted(names))
    anything._skip_layerwise_casting_patterns = (*(anything._skip_layerwise_casting_patterns or ()), *packed)
    _fuse_by_solving()
    _offload_convolutions_once()
    if type(model).__name__.startswith("Flux"):
        _show_shapes_to_flux()


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(m, Packed) for m in module.modules())


def _fuse_by_solving() -> None:
    """`fuse_lora` merges as `hf_quant.merge_adapter` does, and `unfuse_lora` takes out to the bit what it merged.

    Left to themselves both write dense weights, which are rounded to nearest: twice, so the base would be another.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    fuse: Callable[..., None] = PeftAdapterMixin.fuse_lora
    if hasattr(fuse, "__wrapped__"):
        return

    @wraps(fuse)
    def fuse_lora(
        self: Any,  # noqa: ANN401  a ModelMixin
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        from hf_quant.integrations.merging import merge_adapter, tuned_layers

        layers = [layer for _, layer in tuned_layers(self)]
        if not layers or any(layer.merged for layer in layers):
            fuse(self, lora_scale, safe_fusing, adapter_names)
            return
        for layer in layers:
            layer.merge = _leave  # diffusers scales every adapter, and merges those on float layers
        try:
            fuse(self, lora_scale, safe_fusing, adapter_names)
        finally:
            for layer in layers:
                del layer.merge
        lost = [found.lost for found in merge_adapter(self, adapter_names)]
        _log.warning(
            "%d quantized layers keep all but %.0f %% of what the LoRA changes: loaded beside them nothing is lost, "
            "and hf_quant.merge_adapter(model, data=[batches]) may lose less",
            len(lost),
            100 * sum(lost) / len(lost),
        )

    PeftAdapterMixin.fuse_lora = fuse_lora


def _leave(safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """In place of a layer's `merge`."""


def _offload_convolutions_once() -> None:
    """Offloaded leaf by leaf, a convolution's stand-in would be a group, and the matrix in it another of its tensors.

    On disk, the second group's file then has what was in memory after the first had emptied them.
    """
    from diffusers.hooks import group_offloading

    apply: Callable[..., None] = group_offloading._apply_group_offloading_leaf_level
    if hasattr(apply, "__wrapped__"):
        return

    @wraps(apply)
    def leaf_by_leaf(module: nn.Module, config: Any) -> None:  # noqa: ANN401  diffusers' own
        with as_leaves():
            apply(module, config)

    group_offloading._apply_group_offloading_leaf_level = leaf_by_leaf


def _show_shapes_to_flux() -> None:
    """Flux pipelines look the shape of every adapted layer up as `state_dict()["<name>.weight"]`: let them find it."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    expand: Callable[..., dict[str, Tensor]] = FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__
    if hasattr(expand, "__wrapped__"):
        return

    @wraps(expand)
    def seeing(cls: type, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401  diffusers' own arguments
        with expose_logical_weights():
            return expand(cls, *args, **kwargs)

    FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(seeing)
