"""CPU kernels: torch's native 4-bit and 8-bit weight-only products for few tokens, one dequantization for many."""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import IntGrid
from hf_quant.kernels.int_group.bitstream import unpack_bits
from hf_quant.kernels.int_group.reference import dequantize, zero_codes
from hf_quant.runtime.activation import fake_quantize

# Up to these token counts torch's native products are faster than dequantizing once and multiplying: README.md has the
# measurements (2048 x 2048 and 1024 x 4096, one AVX512 core, bfloat16).
INT4_TOKENS = 112
INT8_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Int4Cpu:
    """`aten._weight_int4pack_mm_for_cpu`: value = (code - 8) * scale + shift, shift = (8 - zero) * scale, in bfloat16.

    Its groups are 32 to 256 wide; a wider group, or one scale a row, becomes several with equal scales. Codes of 1 to 3
    bits are codes of 4 bits too, moved to the middle of their range: there the shift is small, and so is its rounding.
    """

    name: ClassVar[str] = "torch-int4-cpu"

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
        (N, K), group, grid = layer.shape, _native_group(layer), layer.weights.grid
        assert isinstance(grid, IntGrid) and group is not None  # noqa: S101, PT018  `supports` has checked it
        middle = 1 << (grid.bits - 1)
        codes = unpack_bits(tensors["qweight"], grid.bits, K).int() + (8 - middle)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        scale, zero = tensors["scale"].float(), zero_codes(tensors, layer)
        shift = scale * (middle - (-grid.low if zero is None else zero.float()))
        columns = torch.arange(0, K, group, device=scale.device) // _group(layer)
        pair = torch.stack((scale, shift), -1)[:, columns].expand(N, -1, -1)
        return [packed, pair.transpose(0, 1).to(dtype).contiguous()]

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        if not 1 <= x_TK.shape[0] <= INT4_TOKENS:
            return F.linear(x_TK, dequantize(tensors, layer, x_TK.dtype))
        y_TN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, blob[0], _native_group(layer), blob[1])
        return y_TN


@dataclass(frozen=True, slots=True)
class Int8Cpu:
    """`aten._weight_int8pack_mm`: symmetric 8-bit weights with one scale a row, in bfloat16."""

    name: ClassVar[str] = "torch-int8-cpu"

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

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        weight, scale = blob
        x_TK = fake_quantize(x_TK, layer.inputs, tensors).contiguous()
        if not 1 <= x_TK.shape[0] <= INT8_TOKENS:
            return F.linear(x_TK, weight.to(x_TK.dtype).mul_(scale[:, None]))
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
