"""What tells one model from another."""

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_quant.measure.reference_logits import identity


def holding(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def test_a_weight_of_another_library_counts_as_what_it_is_made_of() -> None:
    """Such as torchao's, of codes and scales, which cannot be reshaped."""
    codes, scales = torch.arange(24.0).reshape(4, 6), torch.ones(4, 6)
    one = identity(holding(TwoTensor(codes, scales)))
    assert one == identity(holding(TwoTensor(codes.clone(), scales.clone())))
    assert one != identity(holding(TwoTensor(codes + 1, scales)))
    assert one != identity(holding(TwoTensor(codes, 2 * scales)))
    assert one != identity(holding(codes))
