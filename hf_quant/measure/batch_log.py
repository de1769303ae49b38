"""A file that grows by a line a batch: its key, then what is kept of each. A killed evaluation goes on from it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_quant.errors import RunError


def resumed(log: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches in the log; starts it when there is none, and cuts off a line that a killed run left half-written.

    Raises:
        RunError: the log belongs to another evaluation.
    """
    text = log.read_bytes() if log.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    lines = []
    with suppress(ValueError):
        lines = [json.loads(line) for line in whole.splitlines()]
    if whole and (not lines or lines[0] != key):
        raise RunError(
            f"{log} belongs to another evaluation (model, reference, data or batch size); delete it or name another"
        )
    if not whole:
        whole = json.dumps(key).encode() + b"\n"
    partial = log.with_name(log.name + ".partial")
    partial.write_bytes(whole)
    os.replace(partial, log)
    return lines[1:]


def append(log: Path, batch: dict[str, Any]) -> None:
    """One more line, on the disk when this returns."""
    with log.open("ab") as file:
        file.write(json.dumps(batch).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
