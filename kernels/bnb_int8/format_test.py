"""What LLM.int8 does to inputs. Against bitsandbytes itself: plugins/grids/bitsandbytes_test.py."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, format_for, format_named
from hf_quant.kernels.bnb_int8.format import INPUTS, WEIGHTS
from hf_quant.spec import int_spec

FORMAT, LAYER = format_named("bnb-int8/1"), Layer((4, 40), WEIGHTS, INPUTS)


def rounded(x_TK: Tensor) -> Tensor:
    return FORMAT.round_input(x_TK, {}, LAYER)


def test_columns_with_a_large_input_stay_as_they_are() -> None:
    x_TK = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).half().float()
    x_TK[2, 7], x_TK[3, 9] = 6.0, -50.0
    y_TK = rounded(x_TK)
    assert torch.equal(y_TK[:, [7, 9]], x_TK[:, [7, 9]])
    small = [k for k in range(40) if k not in (7, 9)]
    assert (y_TK[:, small] != x_TK[:, small]).any()
    # the step of a token is its largest value below the threshold over 127, large columns' small values included
    top = torch.where(x_TK.abs() < 6, x_TK, 0).abs().amax(1, keepdim=True)
    steps = (y_TK / (top / 127))[:, small]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert ((y_TK - x_TK).abs() <= top / 254 * (1 + 1e-5)).all()


def test_a_token_depends_on_its_batch() -> None:
    """As in bitsandbytes, and the reason why no method gets this format without naming it."""
    x_TK = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).half().float()
    alone = rounded(x_TK[:1])
    x_TK[1, 3] = 9.0
    together = rounded(x_TK)[:1]
    assert together[0, 3] == x_TK[0, 3] != alone[0, 3]
    assert format_for(LAYER).id != "bnb-int8/1"


def test_tokens_of_zeros_and_no_tokens() -> None:
    assert torch.equal(rounded(torch.zeros(2, 40)), torch.zeros(2, 40))
    assert rounded(torch.zeros(0, 40)).shape == (0, 40)


def test_what_it_does_not_hold_has_a_reason() -> None:
    assert "float32 scales" in str(FORMAT.holds(Layer((4, 40), int_spec(8, symmetric=True), INPUTS)))
    assert "8-bit tokens" in str(FORMAT.holds(Layer((4, 40), WEIGHTS)))
