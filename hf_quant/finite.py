"""Weights that are numbers: a NaN anywhere in a model would spread into every figure and calibration statistic."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import CalibrationError, UnsupportedModel

CHUNK = 2**24  # values looked at at a time


@torch.no_grad()
def require_finite(model: nn.Module) -> None:
    """Look at every floating parameter that is in memory, kept ones included.

    Raises:
        UnsupportedModel: naming the first that holds NaN or infinite values.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not all_finite(parameter):
            raise UnsupportedModel(f"{name} holds NaN or infinite values; the checkpoint is damaged")


def require_numbers(states: Mapping[str, Mapping[Any, Mapping[str, Tensor]]]) -> None:
    """Look at what calibration saw: layer -> statistic -> its tensors by name.

    Raises:
        CalibrationError: naming the first layer whose input held NaN or infinite values.
    """
    for name, of_layer in states.items():
        for state in of_layer.values():
            if not all(all_finite(tensor) for tensor in state.values() if tensor.is_floating_point()):
                raise CalibrationError(
                    f"the input of {name} holds NaN or infinite values on the calibration data: look for them in the "
                    "data, or, where float16 overflows, load the model in bfloat16 or float32"
                )


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor of any type holds numbers only. Torch cannot be asked this of 8-bit floats."""
    parts = tensor.detach().reshape(-1).split(CHUNK)
    return all(bool(torch.isfinite(p if p.element_size() > 1 else p.to(torch.bfloat16)).all()) for p in parts)
