"""Checkpoints of a training: written under another name, flushed, then renamed, so that one that is there is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer

from hf_quant.errors import RunError, is_full
from hf_quant.learning.shards import give_state, state_of
from hf_quant.learning.zero import Groups

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
PART = "part"  # a folder beside them, where the next one is written


class WholeCheckpoints(Trainer):  # type: ignore[misc]  # an untyped base
    """transformers' Trainer, whose checkpoints are there whole or not at all."""

    def _get_output_dir(self, trial: Any = None) -> str:  # noqa: ANN401
        return str(Path(self.args.output_dir) / PART)

    stepped: Groups  # what the optimizer was made of

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = state_of(self.optimizer, self.stepped)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        give_state(self.optimizer, self.stepped, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ANN401
        folder = Path(self.args.output_dir)
        with _writing(folder):
            if self.args.should_save:
                _begin(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _finish(folder, f"checkpoint-{self.state.global_step}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
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


def _begin(folder: Path) -> None:
    """Drop what a killed run left unfinished."""
    shutil.rmtree(folder / PART, ignore_errors=True)


def _finish(folder: Path, name: str) -> None:
    """The checkpoint in `PART` is whole: it takes the place of the earlier ones."""
    written = folder / PART / name
    for file in written.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    earlier = list(folder.glob("checkpoint-*"))
    written.rename(folder / name)
    for old in earlier:
        shutil.rmtree(old)
    _begin(folder)
