"""LRQ: where it begins, how little it learns, and its claim on a trained model. See also `roundings_test.py`."""

import pytest
import torch

from hf_quant.errors import ConfigError
from hf_quant.plugins.rounding.flexround import FlexRound
from hf_quant.plugins.rounding.lrq import Lrq
from hf_quant.qtensor import QTensor
from hf_quant.spec import int_spec
from hf_quant.stages.fakequant import Rounding
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest

ROWS = {"bits": 4, "group_size": -1}


def start() -> tuple[torch.Tensor, QTensor]:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    return W, Nearest().solve(W, int_spec(3), AbsMaxRange(), None)


def learned(rounding: Rounding) -> int:
    W, q = start()
    return sum(p.numel() for p, _ in rounding.start(W, q, torch.Generator()).learned())


def test_invariant_it_begins_at_round_to_nearest(claims) -> None:  # type: ignore[no-untyped-def]
    W, q = start()
    fake = Lrq(rank=4).start(W, q, torch.Generator().manual_seed(0))
    holds = fake.export(W).codes.equal(q.codes) and fake(W).equal(q.dequantize())
    claims.invariant("lrq", "before the first step it is round to nearest", holds)


def test_invariant_the_divisor_has_the_rank(claims) -> None:  # type: ignore[no-untyped-def]
    """After any steps: rank r, and two more for the row and the column."""
    W, q = start()
    fake = Lrq(rank=4).start(W, q, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in fake.divisor.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    rank = int(torch.linalg.matrix_rank(fake.divisor().detach()))
    claims.invariant("lrq", "the logarithm of the divisors has rank r + 2", rank == 6, {"rank": rank})


def test_it_learns_fewer_numbers() -> None:
    steps = 24
    assert learned(FlexRound()) == 24 * 64 + 24 + steps
    assert learned(Lrq(rank=4)) == 4 * (24 + 64) + 24 + 64 + steps
    assert learned(Lrq()) == learned(Lrq(rank=8))  # an eighth of 64


def test_what_is_no_rank_is_refused() -> None:
    for rank in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="rank"):
            Lrq(rank=rank)  # type: ignore[arg-type]


@pytest.mark.slow
def test_claim_in_few_steps(judge, claims) -> None:  # type: ignore[no-untyped-def]
    ours, rtn = judge.kl("lrq", steps=12, **ROWS), judge.kl("rtn", **ROWS)
    claims.order("lrq", "KL at most 0.7 of rtn's, 4 bits a row, 12 steps", ours=[ours], theirs=[rtn], factor=0.7)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """At equal steps, over three calibration sets that share nothing. At 5 million weights the fewer learned numbers
    cost a third more than FlexRound's."""
    ours, full, nearest = (judge.kls(method, steps=100, **ROWS) for method in ("lrq", "flexround", "adaround"))
    claims.order(
        "lrq", "KL at most 1.1 of flexround's, 4 bits a row", ours=ours, theirs=full, factor=1.1, reproduced=False
    )
    claims.order("lrq", "KL at most adaround's, 4 bits a row, 100 steps", ours=ours, theirs=nearest)
