"""RunDir: finished units of a run on disk, so that a killed run resumes with the same bytes in the end.

A unit (a block, or one site outside all blocks) is one safetensors file with the unit's whole state and what was
measured. It is written under another name, flushed and then renamed: a file that is there is whole.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_quant.checkpoint import build_skeleton, describe
from hf_quant.errors import RunError, is_full
from hf_quant.recipe import Job, Recipe
from hf_quant.report import Entry
from hf_quant.running.distributed import is_first
from hf_quant.running.locks import hold
from hf_quant.stages.sampler import Batch


class RunDir:
    """Where finished units are kept; with `path=None` nothing is. Use as a context manager: it holds a lock."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds = 0.0  # spent by earlier, interrupted runs
        self._started = time.perf_counter()
        self._lock = hold(path) if path is not None and is_first() else None

    @classmethod
    def open(cls, path: Path | None, model: nn.Module, recipe: Recipe, job: Job, batches: Sequence[Batch]) -> "RunDir":
        """Open or make the directory.

        Raises:
            RunError: it cannot be written, another process uses it, or it holds another job's work.
        """
        if path is None:
            return cls(None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
        except OSError as error:
            raise RunError(f"cannot write to the run directory {path}: {error.strerror}") from None
        try:
            run._claim(_fingerprint(model, recipe, job, batches))
        except BaseException:
            run._release()
            raise
        return run

    def _claim(self, fingerprint: str) -> None:
        assert self.path is not None  # noqa: S101
        plan = self.path / "job.json"
        if plan.exists():
            found = json.loads(plan.read_text())
            if found.get("fingerprint") != fingerprint:
                raise RunError(
                    f"{self.path} holds an unfinished run of another job (other model, data, method or versions); "
                    "delete it or name another run_dir"
                )
            self.seconds = float(found.get("seconds", 0.0))
        self._fingerprint = fingerprint
        self._note()

    def _note(self) -> None:
        """Write the job's fingerprint and the time spent so far."""
        assert self.path is not None  # noqa: S101
        if is_first():
            spent = self.seconds + time.perf_counter() - self._started
            text = json.dumps({"fingerprint": self._fingerprint, "seconds": round(spent, 3)})
            _replace(self.path / "job.json", lambda p: p.write_text(text))

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _file(self, unit: str) -> Path:
        assert self.path is not None  # noqa: S101
        return self.path / f"{unit}.safetensors"

    def load(self, unit: str, module: nn.Module) -> list[Entry] | None:
        """Put a finished unit's weights into `module` and return its entries; None when it is not finished."""
        if self.path is None or not self._file(unit).exists():
            return None
        try:
            with safe_open(self._file(unit), "pt") as file:
                notes = json.loads(file.metadata()["hf_quant"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise RunError(f"{self._file(unit)} is damaged ({error}); delete it and run again") from None
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        build_skeleton(module, notes["description"], dtype=next(iter(module.parameters())).dtype)
        module.load_state_dict({k: v.to(device) for k, v in state.items()}, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return [Entry(**{**e, "shape": tuple(e["shape"])}) for e in notes["entries"]]

    def load_losses(self, unit: str) -> list[tuple[float, ...]] | None:
        """The table rows that an allocator's sensitivity gave for a block; None when they are not there."""
        if self.path is None or not self._table(unit).exists():
            return None
        try:
            return [tuple(map(float, row)) for row in json.loads(self._table(unit).read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self._table(unit)} is damaged ({error}); delete it and run again") from None

    def save_losses(self, unit: str, losses: Sequence[Sequence[float]]) -> None:
        """Write a block's rows of the table; a float's JSON is exact.

        Raises:
            RunError: the disk is full or not writable.
        """
        if self.path is None or not is_first():
            return
        _replace(self._table(unit), lambda p: p.write_text(json.dumps(list(map(list, losses)))))
        self._note()

    def _table(self, unit: str) -> Path:
        assert self.path is not None  # noqa: S101
        return self.path / f"{unit or 'outside'}.losses.json"

    def save(self, unit: str, module: nn.Module, entries: Sequence[Entry]) -> None:
        """Write a finished unit.

        Raises:
            RunError: the disk is full or not writable; units written before are kept.
        """
        if self.path is None or not is_first():
            return
        notes = {"description": describe(module), "entries": [asdict(e) for e in entries]}
        state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        metadata = {"format": "pt", "hf_quant": json.dumps(notes)}
        _replace(self._file(unit), lambda p: save_file(state, p, metadata=metadata))
        self._note()


def _replace(path: Path, write: object) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)  # type: ignore[operator]
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        what = "the disk is full" if is_full(error) else str(error)
        raise RunError(f"cannot write {path}: {what}; finished blocks are kept, free some room and run again") from None


def _fingerprint(model: nn.Module, recipe: Recipe, job: Job, batches: Sequence[Batch]) -> str:
    """Equal only for the same weights, recipe, overrides, seed, data and versions of what computes."""
    from hf_quant.data.calibration import fingerprint
    from hf_quant.running.resources import versions

    digest = hashlib.sha256()
    made = {k: v for k, v in versions().items() if k in ("hf-quant", "torch", "transformers")}
    parts = (recipe, sorted(job.overrides.items()), job.skip, job.allow, job.seed, sorted(made.items()))
    digest.update(repr(parts).encode())
    digest.update((fingerprint(batches) if batches else "").encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
