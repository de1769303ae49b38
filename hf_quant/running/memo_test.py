"""Finished parts of a block answer from memory, and only they."""

import torch
from torch import Tensor, nn

from hf_quant.running.memo import Memo


class Counted(nn.Module):
    """Multiplies by two, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.runs += 1
        return x * 2, None


class Block(nn.Module):
    """`first`, then `second` once or twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.twice = Counted(), Counted(), twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[0]
        x += 1  # a block may write into what it is given
        x = self.second(x)[0]
        return self.second(x)[0] if self.twice else x


def test_a_finished_part_is_computed_once_a_batch() -> None:
    block, inputs = Block(False), [torch.ones(2), torch.full((2,), 5.0)]
    plain, memo = [block(x) for x in inputs], Memo(block)
    memo.finish(["first.inner"], ["second.inner"])
    block.first.runs = block.second.runs = 0
    for _ in range(3):
        for i, x in enumerate(inputs):
            with memo.during(i):
                assert torch.equal(block(x), plain[i])
    assert (block.first.runs, block.second.runs) == (2, 6)
    assert "forward" not in vars(block.first)


def test_a_part_with_open_sites_is_not_remembered() -> None:
    block = Block(False)
    memo = Memo(block)
    memo.finish(["first.inner"], ["first.other"])
    assert not memo.outputs


def test_a_part_that_runs_twice_is_left_out() -> None:
    block = Block(True)
    plain, memo = block(torch.ones(2)), Memo(block)
    memo.finish(["second.inner"], [])
    for _ in range(3):
        with memo.during(0):
            assert torch.equal(block(torch.ones(2)), plain)
    memo.finish(["second.inner"], [])
    assert "second" not in memo.outputs
