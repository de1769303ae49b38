"""The bytes of `int8-act/1`, what it refuses, and that its kernel is exact where integers are."""

import pytest
import torch

from hf_quant.formats import Layer, format_named
from hf_quant.kernels.int8_act.cpu import LONGEST_SUM, Int8Mm
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec, int_spec

FORMAT = format_named("int8-act/1")
WEIGHTS = int_spec(8, symmetric=True, scale="float32")


def test_bytes_are_the_signed_values() -> None:
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    tensors = FORMAT.pack(QTensor(codes, torch.ones(1, 1), None, WEIGHTS, (1, 4)))
    assert tensors["qweight"].tolist() == [[-128, -1, 0, 127]]


@pytest.mark.parametrize("inputs", [act_spec(8), act_spec(8, static=True, symmetric=False), act_spec(5)])
def test_the_kernel_is_exact_on_integers(inputs: Spec) -> None:
    """Whole numbers times whole numbers with scales of 1: no rounding anywhere, and the extremes do not wrap."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (24, 300), dtype=torch.uint8, generator=generator)
    codes[0], codes[1] = 0, 255
    q = QTensor(codes, torch.ones(24, 1), None, WEIGHTS, (24, 300))
    layer, tensors = Layer((24, 300), WEIGHTS, inputs), FORMAT.pack(q)
    low, high = (0, 255) if inputs.zero == "int" else (inputs.grid.low, inputs.grid.high)  # type: ignore[attr-defined]
    x_TK = torch.randint(low, high + 1, (7, 300), generator=generator).float()
    x_TK[:, 0], x_TK[0], x_TK[1] = low, low, high
    x_TK[1, 0] = high if inputs.zero == "int" else low  # every token's own scale is 1
    if inputs.range == "static":
        tensors |= {"input_scale": torch.ones(1), "input_zero_point": torch.tensor([100], dtype=torch.int32)}
        x_TK -= 100
    kernel = Int8Mm()
    y_TN = FORMAT.linear(x_TK, tensors, kernel.prepare(tensors, layer, torch.float32), layer, kernel.name)
    assert torch.equal(y_TN.double(), x_TK.double() @ q.dequantize().double().T)


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (int_spec(4, symmetric=True), act_spec(8), "symmetric 8-bit"),
        (int_spec(8), act_spec(8), "symmetric 8-bit"),
        (int_spec(8, 32, symmetric=True), act_spec(8), "one scale for each row"),
        (WEIGHTS, None, "not quantized"),
        (WEIGHTS, Spec(grid=WEIGHTS.grid, block=(1, 16), range="dynamic"), "groups of 16"),
    ],
)
def test_what_it_does_not_hold_has_a_reason(weights: Spec, inputs: Spec | None, reason: str) -> None:
    assert reason in (FORMAT.holds(Layer((8, 64), weights, inputs)) or "")


def test_rows_whose_sums_could_overflow_are_left_to_the_reference() -> None:
    reason = Int8Mm().supports(Layer((1, LONGEST_SUM + 1), WEIGHTS, act_spec(8)), torch.device("cpu"), torch.float32)
    assert "overflow" in str(reason)
    assert LONGEST_SUM * 255 * 128 < 2**31 <= (LONGEST_SUM + 1) * 255 * 128
