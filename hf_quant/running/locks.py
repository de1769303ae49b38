"""A lock on a folder: two runs never write to the same place."""

import fcntl
from io import TextIOWrapper
from pathlib import Path

from hf_quant.errors import RunError


def hold(folder: Path) -> TextIOWrapper:
    """Lock the folder until the returned file is closed (or the process ends, however it ends).

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        file = path.open("w")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RunError(f"another run is writing to {folder}; wait for it, or choose another folder") from None
    return file
