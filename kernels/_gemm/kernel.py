"""What every format's GPU kernel shares: where it runs, and when tokens are quantized in one pass."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import E4M3, FloatGrid, IntGrid
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels.hadamard.op import rotate
from hf_quant.runtime.activation import fake_quantize
from hf_quant.spec import Spec

LowRank = tuple[Tensor, Tensor]  # a = x down^T [T, R], up [N, R]


class TritonKernel(ABC):
    """A `Grouping` kernel that runs on GPUs with Triton, for the layers it `takes`. Its blob begins with the codes."""

    name: ClassVar[str] = "triton"
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        return refuses(device, dtype) or self.takes(layer)

    def takes(self, layer: Layer) -> str | None:
        """None when it can run such a layer where Triton runs, else the reason why not."""
        return None

    @abstractmethod
    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """See `Kernel.prepare`."""

    @abstractmethod
    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""

    @abstractmethod
    def dense(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Tensor:
        """See `Grouping.dense`."""

    @abstractmethod
    def product(
        self,
        x_TK: Tensor,
        tensors: Tensors,
        blob: list[Tensor],
        layer: Layer,
        low_rank: LowRank | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """`q(x) W^T (+ a up^T)`: the branch joins before the result is written. With `experts`, see `grouped`."""

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        return self.product(x_TK, tensors, blob, layer)

    def grouped(self, x_TK: Tensor, experts_TC: Tensor, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Grouping.grouped`."""
        return self.product(x_TK, {}, blob, layer, experts=experts_TC)


class MainLoop(TritonKernel):
    """A kernel that is nothing but the main loop; its blob is shuffled words, scales, and a table of levels."""

    @abstractmethod
    def weight(self, blob: list[Tensor], layer: Layer) -> Weight:
        """What the loop is told of the blob."""

    @abstractmethod
    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """Codes as the words have them -> `qweight`."""

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        codes_NK = self.weight(blob, layer).shuffle.unpack(blob[0], layer.shape)
        return {"qweight": self.stored(codes_NK, layer)}

    def dense(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Tensor:
        """See `Grouping.dense`."""
        from hf_quant.kernels._gemm.launch import dequantize

        weight, rotation = self.weight(blob, layer), layer.weights.rotation
        if rotation is None:
            return dequantize(blob, weight, dtype)
        return rotation.inverse(dequantize(blob, weight, torch.float32)).to(dtype)

    def product(
        self,
        x_TK: Tensor,
        tensors: Tensors,
        blob: list[Tensor],
        layer: Layer,
        low_rank: LowRank | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """See `TritonKernel.product`; a rotated weight multiplies rotated inputs."""
        from hf_quant.kernels._gemm.launch import matmul

        x_TK, rotation = fake_quantize(x_TK, layer.inputs, tensors), layer.weights.rotation
        if rotation is not None:
            x_TK = rotate(x_TK, rotation)
        return matmul(x_TK, blob, self.weight(blob, layer), x_TK.dtype, low_rank=low_rank, experts=experts)


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
