"""Evaluated: a model trains in eval mode, which is how it will be run: nothing is dropped out."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_quant.integrations.recomputing import recompute_activations


def recompute_as_evaluated(model: nn.Module) -> None:
    """Have every block compute its activations again in the backward pass.

    They do so in training mode only, which turns their dropout on as well: not inside.
    """
    recompute_activations(model)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = partial(_in_eval_mode, module, module._gradient_checkpointing_func)


def _in_eval_mode(layer: nn.Module, recompute: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
    def evaluated(*args: Any) -> Any:  # noqa: ANN401
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    return recompute(evaluated, *args)


def as_evaluated(model: nn.Module) -> None:
    """Eval mode (the Trainer sets the other), but for layers that compute their activations again."""
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing
