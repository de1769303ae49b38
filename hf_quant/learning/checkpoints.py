"""Checkpoints of a training: written under another name, flushed, then renamed, so that one that is there is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_quant.errors import RunError, is_full

PART = "part"  # a folder beside them, where the next one is written


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong is told; earlier checkpoints are kept.

    Raises:
        RunError: the disk is full or not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = "the disk is full" if is_full(error) else str(error)
        raise RunError(
            f"cannot write a checkpoint to {folder}: {what}; the last one is kept, free some room and run again"
        ) from None


def begin(folder: Path) -> None:
    """Drop what a killed run left unfinished."""
    shutil.rmtree(folder / PART, ignore_errors=True)


def finish(folder: Path, name: str) -> None:
    """The checkpoint in `PART` is whole: it takes the place of the earlier ones."""
    written = folder / PART / name
    for file in written.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    earlier = list(folder.glob("checkpoint-*"))
    written.rename(folder / name)
    for old in earlier:
        shutil.rmtree(old)
    begin(folder)
