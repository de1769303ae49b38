"""CPU kernels: torch's native 4-bit and 8-bit weight-only products for few tokens, one dequantization for many."""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels.int_group import int4pack
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits, words
from hf_quant.kernels.int_group.reference import SLICE, zero_codes
from hf_quant.products import multiplies_bfloat16, operand, product, sums
from hf_quant.runtime.activation import fake_quantize

# Up to these token counts torch's native products are faster than dequantizing once and multiplying: README.md has the
# measurements (2048 x 2048 and 1024 x 4096, bfloat16, one core with AVX-512 and its BF16, and one with AVX2 alone).
INT4_TOKENS = 144 if multiplies_bfloat16() else 224
INT8_TOKENS = 40 if multiplies_bfloat16() else 48


@dataclass(frozen=True, slots=True)
class Int4Cpu:
    """`aten._weight_int4pack_mm_for_cpu`: value = (code - 8) * scale + shift, shift = (8 - zero) * scale, in bfloat16.

    Its groups are 32 to 256 wide; a wider group, or one scale a row, becomes several with equal scales. Codes of 1 to 3
    bits are codes of 4 bits too, moved to the middle of their range: there the shift is small, and so is its rounding.
    """

    name: ClassVar[str] = "torch-int4-cpu"
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        N, K = layer.shape
        if (reason := _not_bf16_cpu(device, dtype)) is not None:
            return reason
        if layer.weights.grid.bits > 4:
            return f"weights of at most 4 bits, not {layer.weights.grid.bits:g}"
        if N % 16:
            return f"needs a multiple of 16 outputs, not {N}"
        if _native_group(layer) is None:
            return f"needs groups and inputs in multiples of 32, not groups of {_group(layer)} in {K}"
        return None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[packed codes, (scale, shift) `[K/g, N, 2]`]."""
        N, K = layer.shape
        packed = tensors["qweight"].new_empty(N, K // 2, dtype=torch.uint8)
        for rows in _slices(layer):  # whole matrices of codes would leave holes in the heap between what lasts
            codes = unpack_bits(tensors["qweight"][rows], int(layer.weights.grid.bits), K)
            packed[rows] = int4pack.pack(codes + _raised(layer))
        scale = tensors["scale"].float()
        shift = scale * (8 - _zero(tensors, layer))
        return [packed, _by_group(torch.stack((scale, shift), -1), layer, N).to(dtype).contiguous()]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        (N, K), bits = layer.shape, int(layer.weights.grid.bits)
        qweight = blob[0].new_empty(N, words(K, bits), dtype=torch.int32)
        for rows in _slices(layer):
            qweight[rows] = pack_bits((int4pack.columns(blob[0][rows]) - _raised(layer)).T, bits)
        return {"qweight": qweight}

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> tuple[tuple[int | None, str], ...]:
        """See `Describing.describe`."""
        return (INT4_TOKENS, "torch's 4-bit product"), (None, f"dequantized some rows at a time, {sums()} products")

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        if 1 <= x_TK.shape[0] <= INT4_TOKENS:
            y_TN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, blob[0], _native_group(layer), blob[1])
            return y_TN
        return self._dequantized(x_TK, tensors, blob[0], layer)

    def gradient(self, grad_TN: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Differentiating.gradient`: some whole groups of columns dequantized at a time."""
        (N, K), group = layer.shape, _native_group(layer) or 1
        grad, grad_TK = operand(grad_TN), grad_TN.new_empty(grad_TN.shape[0], K)
        scale_GN = _by_group(tensors["scale"].float(), layer, N)
        zero_GN = _by_group(_zero(tensors, layer).expand_as(tensors["scale"]), layer, N)
        step = max(1, SLICE // max(1, N * group))  # groups
        for first in range(0, K // group, step):
            groups = slice(first, min(first + step, K // group))
            columns = slice(groups.start * group, groups.stop * group)
            W_GgN = int4pack.columns(blob[0], columns).view(-1, group, N).float()
            W_GgN.sub_(zero_GN[groups, None]).mul_(scale_GN[groups, None])
            grad_TK[:, columns] = grad @ W_GgN.view(-1, N).to(grad_TN.dtype).to(grad.dtype).T
        return grad_TK

    def _dequantized(self, x_TK: Tensor, tensors: Tensors, packed: Tensor, layer: Layer) -> Tensor:
        """`x W^T`, rows of W dequantized as they are needed: the same bits as the reference's, without its matrix."""
        N, K = layer.shape
        x = operand(x_TK)
        y_TN = x.new_empty(len(x), N)
        # in the order of the columns: strided ranges cost more than the product
        scale_GN = _by_group(tensors["scale"].to(_product_type(layer)), layer, N).contiguous()
        zero_GN = _by_group(_zero(tensors, layer).to(x_TK.dtype).expand_as(tensors["scale"]), layer, N).contiguous()
        for rows in _slices(layer):
            W_GgN = int4pack.differences(packed[rows], zero_GN[:, rows]).to(scale_GN.dtype)
            W_GgN.mul_(scale_GN[:, None, rows])
            torch.mm(x, W_GgN.view(K, -1).to(x_TK.dtype).to(x.dtype), out=y_TN[:, rows])
        return y_TN.to(x_TK.dtype)


@dataclass(frozen=True, slots=True)
class Int8Cpu:
    """`aten._weight_int8pack_mm`: symmetric 8-bit weights with one scale a row, in bfloat16."""

    name: ClassVar[str] = "torch-int8-cpu"
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        spec, K = layer.weights, layer.shape[1]
        if (reason := _not_bf16_cpu(device, dtype)) is not None:
            return reason
        if spec.grid != IntGrid(8, signed=True) or spec.zero != "none":
            return "symmetric 8-bit weights only"
        if spec.blocks(layer.shape)[1] != 1:
            return f"one scale a row only, not groups of {spec.block[1]}"
        if K % 16:  # torch crashes on these
            return f"needs a multiple of 16 inputs, not {K}"
        return None

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """[int8 weight `[N, K]`, scale `[N]`]."""
        codes = unpack_bits(tensors["qweight"], 8, layer.shape[1])
        scale = tensors["scale"].to(dtype).expand(layer.shape[0], 1).reshape(-1)
        return [(codes ^ 0x80).view(torch.int8).contiguous(), scale.contiguous()]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        return {"qweight": pack_bits(blob[0].view(torch.uint8) ^ 0x80, 8)}

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> tuple[tuple[int | None, str], ...]:
        """See `Describing.describe`."""
        return (INT8_TOKENS, "torch's 8-bit product"), (None, f"dequantized, then a {sums()} product")

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        weight, scale = blob
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        if not 1 <= x_TK.shape[0] <= INT8_TOKENS:
            return product(x_TK, weight.to(x_TK.dtype).mul_(scale[:, None]))
        y_TN: Tensor = torch.ops.aten._weight_int8pack_mm(x_TK, weight, scale)
        return y_TN


def _not_bf16_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    return None if dtype == torch.bfloat16 else f"fast in bfloat16 only, not {str(dtype).removeprefix('torch.')}"


def _group(layer: Layer) -> int:
    """Columns that share a scale."""
    return layer.weights.block_size(layer.shape)[1]


def _native_group(layer: Layer) -> int | None:
    """The widest group the 4-bit product knows that divides ours and the row, so that a scale never changes inside."""
    common = gcd(_group(layer), layer.shape[1])
    return next((size for size in (256, 128, 64, 32) if common % size == 0), None)


def _raised(layer: Layer) -> int:
    """What is added to a narrower code to make it one of 4 bits, in the middle of their range."""
    return 8 - (1 << (int(layer.weights.grid.bits) - 1))


def _zero(tensors: Tensors, layer: Layer) -> Tensor:
    """The zero points of the raised codes, float32 `[nb, G]` or `[1, 1]`."""
    grid, zero = layer.weights.grid, zero_codes(tensors, layer)
    assert isinstance(grid, IntGrid)  # noqa: S101  `supports` has checked it
    return (torch.full((1, 1), -grid.low) if zero is None else zero).float() + _raised(layer)


def _by_group(blocks: Tensor, layer: Layer, N: int) -> Tensor:
    """What the format has by block `[nb, G, ...]`, by torch's narrower groups: `[K / g, N, ...]`."""
    columns = torch.arange(0, layer.shape[1], _native_group(layer) or 1) // _group(layer)
    return blocks[:, columns].expand(N, *[-1] * (blocks.dim() - 1)).transpose(0, 1)


def _product_type(layer: Layer) -> torch.dtype:
    """Where a product with a scale is rounded once: in bfloat16 if that holds the scale, else in float32."""
    scale = layer.weights.scale
    kinds = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    return torch.bfloat16 if isinstance(scale, FloatGrid) and scale.torch_dtype in kinds else torch.float32


def _slices(layer: Layer) -> list[slice]:
    """Some whole blocks of rows at a time."""
    N, K = layer.shape
    step = max(1, SLICE // (K * int4pack.block())) * int4pack.block()
    return [slice(start, min(N, start + step)) for start in range(0, N, step)]
