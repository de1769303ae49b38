"""What every format's GPU kernel shares: where it runs, and when tokens are quantized in one pass."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import E4M3, FloatGrid, IntGrid
from hf_quant.spec import Spec

LowRank = tuple[Tensor, Tensor]  # a = x down^T [T, R], up [N, R]


class TritonKernel(ABC):
    """A `Kernel` that runs on GPUs with Triton, for the layers it `takes`."""

    name: ClassVar[str] = "triton"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        return refuses(device, dtype) or self.takes(layer)

    def takes(self, layer: Layer) -> str | None:
        """None when it can run such a layer where Triton runs, else the reason why not."""
        return None

    @abstractmethod
    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """See `Kernel.prepare`."""

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        return self.product(x_TK, tensors, blob, layer, None)

    @abstractmethod
    def product(
        self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, low_rank: LowRank | None
    ) -> Tensor:
        """`q(x) W^T (+ a up^T)`: the branch joins before the result is written."""


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


def refuses_tokens(spec: Spec) -> str | None:
    """None when the fused kernel quantizes tokens so, else the reason why not."""
    if spec.grid != E4M3 and not isinstance(spec.grid, IntGrid):
        return f"tokens become integers or float8_e4m3fn, not {spec.grid}"
    if spec.scale != FloatGrid("float32"):
        return f"scales of tokens are float32 numbers, not {spec.scale}"
    if spec.block[1] != -1:
        return "a token has one scale"
    return None


def multiplies_float8(device: torch.device) -> bool:
    """Whether tensor cores take float8_e4m3fn there."""
    if device.type != "cuda":
        return True  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def by_row(blocks: Tensor, layer: Layer) -> Tensor:
    """One row of blocks for each row of the weight: `[nb, ...]` -> `[N, ...]`."""
    rows = layer.weights.block_size(layer.shape)[0]
    return blocks.repeat_interleave(rows, 0)[: layer.shape[0]] if rows > 1 else blocks
