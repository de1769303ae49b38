"""One progress bar with the time that is left. Silent when nobody looks."""

import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_SHOWN: ContextVar["Progress | None"] = ContextVar("bar", default=None)  # what is on the screen; changes no number


def inner(iterable: Iterable[T], *, description: str, total: int) -> Iterator[T]:
    """The items, with a second bar below the one that is shown while they last; silent where none is shown."""
    bar = _SHOWN.get()
    if bar is None:
        yield from iterable
        return
    task = bar.add_task(description, total=total)
    try:
        yield from bar.track(iterable, total=total, task_id=task)
    finally:
        bar.remove_task(task)


def track(iterable: Iterable[T], *, description: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """The items of `iterable`, with a bar on stderr: description, count, elapsed and remaining time.

    Nothing is shown when `enabled` is False, stderr is not a terminal, or Hugging Face's progress bars are off
    (`HF_HUB_DISABLE_PROGRESS_BARS=1`, `huggingface_hub.utils.disable_progress_bars()` or transformers' counterpart).

    Args:
        iterable: what to go through; consumed lazily, one item at a time.
        description: a few words in front of the bar.
        total: number of items; None: `len(iterable)` when it has one, else a bar without an end.
        enabled: False keeps quiet.
    """
    if not (enabled and _watched()):
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        before = _SHOWN.get()
        _SHOWN.set(bar)  # not by token: a generator may end in another context than it began in
        try:
            yield from bar.track(iterable, total=total, description=description)
        finally:
            _SHOWN.set(before)


def _watched() -> bool:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    return sys.stderr.isatty() and not are_progress_bars_disabled()
