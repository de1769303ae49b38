"""What every format's GPU kernel shares, and when tokens are quantized in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_quant.formats import ALONE, Around, Layer, Tensors
from hf_quant.grids import E4M3, FloatGrid, IntGrid
from hf_quant.kernels._gemm import machine
from hf_quant.kernels._gemm.configs import BUCKETS, Config, bucket, choose, key, remembered
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels.hadamard.op import rotate
from hf_quant.runtime.activation import fake_quantize
from hf_quant.spec import Spec

if TYPE_CHECKING:
    from hf_quant.kernels._gemm.launch import Tokens

ALL = frozenset({"low_rank", "rotation", "entry_T"})


class TritonKernel(ABC):
    """A `Fusing`, `Grouping` kernel that runs on GPUs by Triton, for what it `takes`. Its blob begins with codes."""

    name: ClassVar[str] = "triton"
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        return machine.refuses(device, dtype) or self.takes(layer)

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
        around: Around = ALONE,
        experts: Tensor | None = None,
    ) -> Tensor:
        """`q(x) W^T` and what is around it: a branch joins before the result is written. `experts`: see `grouped`."""

    @abstractmethod
    def config(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: int) -> Config:
        """Which tile runs for so many tokens."""

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> tuple[tuple[int | None, str], ...]:
        """See `Describing.describe`: a bucket of tokens after the other."""
        runs = [(b, told(self.config(blob, layer, dtype, b))) for b in BUCKETS]
        return (*runs, (None, told(self.config(blob, layer, dtype, BUCKETS[-1] + 1))))

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        return self.product(x_TK, tensors, blob, layer)

    def fuses(self, layer: Layer) -> frozenset[str]:
        """See `Fusing.fuses`."""
        return frozenset({"low_rank"})

    def fused(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, around: Around) -> Tensor:
        """See `Fusing.fused`."""
        return self.product(x_TK, tensors, blob, layer, around)

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

    def config(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: int) -> Config:
        """See `TritonKernel.config`."""
        return choose(self.weight(blob, layer), dtype, bucket(tokens), blob[0].device)

    def tunings(
        self, blob: list[Tensor], layer: Layer, dtype: torch.dtype, tokens: Sequence[int]
    ) -> dict[str, Callable[[], str]]:
        """See `Tunable.tunings`."""
        from hf_quant.kernels._gemm.tune import tune

        weight = self.weight(blob, layer)

        def tuned(count: int) -> str:
            (best,) = tune(blob, weight, dtype, tokens=[count]).values()
            return told(best)

        keys = {key(weight, dtype, count): count for count in tokens or BUCKETS}
        return {name: partial(tuned, n) for name, n in keys.items() if name not in remembered(blob[0].device)}

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
        around: Around = ALONE,
        experts: Tensor | None = None,
    ) -> Tensor:
        """See `TritonKernel.product`; a rotated weight multiplies rotated inputs."""
        from hf_quant.kernels._gemm.launch import matmul

        x_TK, rotation = fake_quantize(x_TK, layer.inputs, tensors), layer.weights.rotation
        if rotation is not None:
            x_TK = rotate(x_TK, rotation)
        return matmul(x_TK, blob, self.weight(blob, layer), x_TK.dtype, low_rank=around.low_rank, experts=experts)


def told(config: Config) -> str:
    """A configuration in words."""
    if config.way == "dense":
        return "dequantized, then the vendor's product"
    if config.way == "vendor":
        return "the vendor's product"
    way = {"vector": "multiply-add", "tensor": "tensor cores"}[config.way]
    parts = f", K in {config.splits} parts" if config.splits > 1 else ""
    return (
        f"{way}, tiles of {config.BM} tokens x {config.BN} outputs{parts}, {config.num_warps} warps, "
        f"{config.num_stages} stages"
    )


def in_one_pass(x_TK: Tensor, spec: Spec, tensors: Tensors, around: Around) -> "Tokens":
    """The input rotated and rounded as its layer says, read once."""
    from hf_quant.kernels._gemm.quantized import Transform, quantize, static_range

    static, rotation = static_range(tensors, around.entry_T), around.rotation
    if rotation is None:
        return quantize(x_TK, spec, static)
    transform = Transform.of(rotation, x_TK)
    if transform is None:  # an order that is no power of two
        return quantize(rotate(x_TK, rotation), spec, static)
    return quantize(x_TK, spec, static, transform)


def refuses_tokens(spec: Spec) -> str | None:
    """None when the fused kernel quantizes tokens so, else the reason why not."""
    if spec.grid != E4M3 and not isinstance(spec.grid, IntGrid):
        return f"tokens become integers or float8_e4m3fn, not {spec.grid}"
    if spec.scale != FloatGrid("float32"):
        return f"scales of tokens are float32 numbers, not {spec.scale}"
    if spec.block[1] != -1:
        return "a token has one scale"
    return None


def by_row(blocks: Tensor, layer: Layer) -> Tensor:
    """One row of blocks for each row of the weight: `[nb, ...]` -> `[N, ...]`."""
    rows = layer.weights.block_size(layer.shape)[0]
    return blocks.repeat_interleave(rows, 0)[: layer.shape[0]] if rows > 1 else blocks
