"""Tuning: the fastest way to run every shape of a quantized model on the device at hand, found once and kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer
from hf_quant.running.progress import track
from hf_quant.runtime.linear import QuantLinear


@runtime_checkable
class Tunable(Protocol):
    """A kernel with more than one way to run."""

    def tunings(
        self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: Sequence[int]
    ) -> Mapping[str, Callable[[], str]]:
        """What has not been tuned for such layers: name -> tunes it, keeps what was found, and says it in words.

        `tokens`: counts to tune for; none: all that the kernel tells apart.
        """


def tune(model: nn.Module, *, tokens: Sequence[int] = (), progress: bool = True) -> dict[str, str]:
    """Time the ways in which the model's layers can run, and keep the fastest for this and later processes.

    Every shape and number of tokens is kept as soon as it is found: interrupted, the next call goes on from there. What
    is known is not tuned again. Layers are laid out for their kernels, as the first forward would.

    Args:
        model: quantized, on the GPU that it will run on.
        tokens: only for so many tokens at once, such as `[1, 8]`; none: for all that kernels tell apart.
        progress: show a bar.

    Returns:
        What was found: shape, type and tokens -> configuration. Empty when all was known.

    Raises:
        ConfigError: no layer here has a kernel that can be tuned, or a count that is not positive.
    """
    if any(count < 1 for count in tokens):
        raise ConfigError(f"tokens={list(tokens)}: counts of tokens are positive")
    todo: dict[str, Callable[[], str]] = {}
    tunable = False
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for module in layers:
        kernel = next((k for k in module.format.kernels if k.name == module.kernel), None)
        if isinstance(kernel, Tunable):
            tunable = True
            todo |= kernel.tunings(*module.laid_out(), module.compute_dtype, tokens)
    if not tunable:
        raise ConfigError(_why(layers))
    bar = track(todo.items(), description="tuning", total=len(todo), enabled=progress)
    return {name: find() for name, find in bar}


def _why(layers: Sequence[QuantLinear]) -> str:
    if not layers:
        return "nothing to tune: the model has no quantized layer"
    where = sorted({str(layer.qweight.device) for layer in layers})
    if any(name.startswith("cuda") for name in where):
        kernels = sorted({layer.kernel for layer in layers})
        return f"nothing to tune: the layers run {', '.join(kernels)}; hf_quant.explain(model) says why"
    found = "move the model there first, model.to('cuda')" if torch.cuda.is_available() else "none is available here"
    return f"tuning is for kernels on a GPU, and the model is on {', '.join(where)}: {found}"
