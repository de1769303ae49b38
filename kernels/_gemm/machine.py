"""Where Triton kernels run, and what the machine multiplies."""

from importlib.util import find_spec

import torch


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when Triton kernels run there, else the reason why not."""
    if device.type != "cuda":
        return f"runs on cuda, not {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16, not {dtype}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU is available here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def multiplies_float8(device: torch.device) -> bool:
    """Whether tensor cores take float8_e4m3fn there."""
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
