"""The operations that are measured on GPUs, run by Triton's interpreter: each way runs, and they agree."""

import pytest
import torch
from torch import Tensor

from hf_quant.kernels._gemm.launch import Tokens
from hf_quant.kernels.bench.operations import OPERATIONS, Operation
from hf_quant.qtensor import QTensor


def numbers(result: object) -> Tensor:
    """What was computed, whatever it is wrapped in."""
    if isinstance(result, Tokens):
        return result.values.float() * result.scale[:, None]
    if isinstance(result, QTensor):
        return result.dequantize()
    assert isinstance(result, Tensor)
    return result.float()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_ways_agree(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.kernels._gemm.machine.refuses", lambda device, dtype: None)
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "as on a GPU")
    ours, theirs = operation.make((128, 512), torch.device("cpu"), torch.float32).values()
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = numbers(ours(x)), numbers(theirs(x))
    assert (a - b).norm() < 2e-2 * b.norm()
