"""Scaled: float16 has nothing below 6e-8, where most gradients of a mean over thousands of tokens lie.

The gradients of float16 layers are 4096 times as large, and stay so: whoever clips and steps is told in his own numbers
(the largest norm, and Adam's epsilon), which comes to the same. What is learned is float32.
"""

import torch
from torch import nn

SCALE = 4096.0  # a mean over some thousand tokens becomes about the sum of them, whose gradients are below one


def scale_of(model: nn.Module) -> float:
    """What the loss has to be multiplied by."""
    return SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
