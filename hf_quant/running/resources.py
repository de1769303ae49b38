"""What a run used: memory, versions of the libraries that took part."""

import ctypes
import mmap
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from hf_quant.errors import ConfigError

LIBRARIES = ("hf-quant", "torch", "transformers", "diffusers", "accelerate", "safetensors", "triton", "bitsandbytes")


MADV_PAGEOUT = 21  # linux/mman.h


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
    return trim


def release_freed() -> None:
    """Give freed memory back to the system, holes between live tensors included.

    glibc keeps a freed temporary for itself, and torch's aligned requests then rarely fit the hole it left: quantizing
    weight after weight, holes would add up to more than the float model. Does nothing with other C libraries.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def release_mapped(tensor: Tensor) -> None:
    """Let the system drop the pages under a tensor that nobody will read soon: of a checkpoint's mapped file.

    Other tensors of the file keep all of it mapped. No value changes: what is read again comes from the file. Does
    nothing on other systems than Linux, and for files of other users.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.untyped_storage().resizable():
        return  # torch's own memory is freed with the tensor
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)


def versions() -> dict[str, str]:
    """Installed versions by distribution name, Python included."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "torch":
                found[name] = torch.__version__
    return found


class Peak:
    """Most memory in use since it was made: the GPU's on a GPU, else resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def bytes(self) -> int:
        """So far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return peak_bytes()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor type and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def require_device(device: torch.device | None) -> None:
    """Raises `ConfigError` where there is no such device."""
    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch built without its kind, or no such number
        raise ConfigError(f"device={str(device)!r}: there is no such device here ({error})") from None
