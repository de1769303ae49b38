"""Memo: what the finished parts of a block put out, so that later passes over the same data do not compute it again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Memo:
    """Outputs of direct children of a block, by micro-batch.

    A child is finished when all of its sites are quantized: with the data's micro-batches fixed it then gives the same
    output in every later pass. A child that runs twice in one forward is left out.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.outputs: dict[str, dict[int, Any]] = {}
        self.left_out: set[str] = set()

    def finish(self, paths: Sequence[str], open_paths: Sequence[str]) -> None:
        """Sites `paths` (inside the block) are quantized now, `open_paths` are not yet."""
        begun = {p.partition(".")[0] for p in paths if "." in p}
        for child in begun - {p.partition(".")[0] for p in open_paths} - self.left_out:
            self.outputs.setdefault(child, {})

    def forget(self) -> None:
        """What was finished is to change."""
        self.outputs.clear()

    @contextmanager
    def during(self, i: int) -> Iterator[None]:
        """Inside, finished children answer micro-batch `i` from memory, or remember what they compute."""
        children = {name: self.block.get_submodule(name) for name in self.outputs}
        for name, child in children.items():
            child.forward = self._answer(name, i, child.forward)
        try:
            yield
        finally:
            for child in children.values():
                del child.forward  # the instance's own; the class's is visible again

    def _answer(self, name: str, i: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        known = i in self.outputs[name]
        runs = 0

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal runs
            runs += 1
            if known and runs == 1:
                return _copy(self.outputs[name][i])
            result = compute(*args, **kwargs)
            if runs > 1:
                self.left_out.add(name)
                self.outputs.pop(name, None)
            elif name in self.outputs:
                self.outputs[name][i] = _copy(result)
            return result

        return forward


def _copy(value: Any) -> Any:  # noqa: ANN401  whatever a module returns
    """Blocks may write into what they are given."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copy(v) for v in value)
    return value
