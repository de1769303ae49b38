"""Weights that are numbers: a NaN anywhere in a model would spread into every figure and calibration statistic."""

import torch
from torch import nn

from hf_quant.errors import UnsupportedModel

CHUNK = 2**24  # values looked at at a time


@torch.no_grad()
def require_finite(model: nn.Module) -> None:
    """Look at every floating parameter that is in memory, kept ones included.

    Raises:
        UnsupportedModel: naming the first that holds NaN or infinite values.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta:
            continue
        if not all(bool(torch.isfinite(part).all()) for part in parameter.detach().reshape(-1).split(CHUNK)):
            raise UnsupportedModel(f"{name} holds NaN or infinite values; the checkpoint is damaged")
