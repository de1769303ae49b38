"""What diffusers does with weights without asking a quantizer, and how packed ones take part in it."""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from hf_quant.checkpoint import packed_modules
from hf_quant.runtime.packed import Packed, expose_logical_weights
from hf_quant.runtime.stand_in import StandIn


def adapt(model: nn.Module) -> None:
    """Prepare a model with packed layers for layerwise casting and, of the Flux family, for `load_lora_weights`.

    Layerwise casting leaves packed layers alone: they are smaller than in 8-bit floats already, and their biases and
    scales would lose precision without a word. A convolution's stand-in is a convolution to it, and is left alone too.
    """
    anything: Any = model
    stand_ins = {n for n, m in model.named_modules() if isinstance(m, StandIn) and _holds_packed(m)}
    names = stand_ins | {name for name, _ in packed_modules(model)}
    packed = tuple(f"^{re.escape(name)}$" for name in sorted(names))
    anything._skip_layerwise_casting_patterns = (*(anything._skip_layerwise_casting_patterns or ()), *packed)
    if type(model).__name__.startswith("Flux"):
        _show_shapes_to_flux()


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(m, Packed) for m in module.modules())


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
