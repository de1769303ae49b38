"""The C++ kernels of `lut-group/1`, `codebook-group/1` and `float8/1` on CPU: tables looked up in registers."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import Layer, Tensors
from hf_quant.grids import E4M3, CodebookGrid, FloatGrid, TableGrid
from hf_quant.kernels._cpu.kernel import NativeKernel, WithGradient
from hf_quant.kernels._cpu.layout import Kind
from hf_quant.kernels._gemm.kernel import by_row
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits
from hf_quant.kernels.lut.decode import table_grid
from hf_quant.kernels.lut.scales import unpack_scales
from hf_quant.spec import Spec


@dataclass(frozen=True, slots=True)
class Native(WithGradient):
    """`table[code] scale` with up to 16 values of any kind, or up to 256 that are bfloat16 numbers."""

    def takes(self, layer: Layer) -> str | None:
        """See `NativeKernel.takes`."""
        grid = table_grid(layer)
        if layer.weights.rotation is not None:
            return "the weights are rotated"
        if grid.vector != 1:
            return f"codes of {grid.vector} values"
        if grid.code_bits > 4 and not _narrow(grid.table()):
            return f"codes of {grid.code_bits} bits stand for values that bfloat16 does not hold"
        return None

    def kind(self, layer: Layer) -> Kind:
        """See `NativeKernel.kind`: tokens of 16 bits, rounded before where the layer rounds them."""
        if table_grid(layer).code_bits > 4:
            return "levels8"
        if not _narrow(table_grid(layer).table()):
            return "floats4"
        return "scaled4" if _exact(layer.weights) else "levels4"

    def middle(self, layer: Layer) -> int:
        """None: codes stand for what the table says."""
        return 0

    def values(self, tensors: Tensors, layer: Layer) -> Tensor:
        """See `NativeKernel.values`."""
        table = table_grid(layer).table().flatten()
        return F.pad(table, (0, (256 if table_grid(layer).code_bits > 4 else 16) - len(table)))

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return unpack_bits(qweight, table_grid(layer).code_bits, layer.shape[1])

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return pack_bits(codes_NK, table_grid(layer).code_bits)

    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[Tensor, None]:
        """See `NativeKernel.ranges`."""
        return by_row(unpack_scales(tensors, layer)[0], layer), None

    def tensor_scale(self, tensors: Tensors) -> Tensor:
        """See `NativeKernel.tensor_scale`."""
        return tensors["tensor_scale"].float() if "tensor_scale" in tensors else torch.empty(0)


@dataclass(frozen=True, slots=True)
class Float8Native(Native):
    """The same of bytes that are their own codes."""

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return qweight.view(torch.uint8)

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return codes_NK.view(torch.float8_e4m3fn if layer.weights.grid == E4M3 else torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class CodebookNative(NativeKernel):
    """`codebook[block, code]` of up to 16 levels, each rounded to bfloat16 as the reference rounds it."""

    def takes(self, layer: Layer) -> str | None:
        """See `NativeKernel.takes`."""
        bits = layer.weights.grid.bits
        return None if bits <= 4 else f"codes of {bits:g} bits: a row has more levels than one lookup takes"

    def kind(self, layer: Layer) -> Kind:
        """See `NativeKernel.kind`."""
        return "rows4"

    def middle(self, layer: Layer) -> int:
        """None: codes stand for what the codebook says."""
        return 0

    def values(self, tensors: Tensors, layer: Layer) -> Tensor:
        """See `NativeKernel.values`."""
        levels = tensors["codebook"].float().unflatten(1, (-1, 1 << _bits(layer)))
        return by_row(F.pad(levels, (0, 16 - levels.shape[-1])), layer)

    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.codes`."""
        return unpack_bits(qweight, _bits(layer), layer.shape[1])

    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """See `NativeKernel.stored`."""
        return pack_bits(codes_NK, _bits(layer))

    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[None, None]:
        """None: the levels carry the scale."""
        return None, None


def _bits(layer: Layer) -> int:
    grid = layer.weights.grid
    assert isinstance(grid, CodebookGrid)  # noqa: S101  `holds` has checked it
    return grid.bits


@cache
def _exact(spec: Spec) -> bool:
    """Whether bfloat16 holds every product of a value and a scale, beyond what is too small or too large for it."""
    grid, scale = spec.grid, spec.scale
    if not isinstance(grid, TableGrid) or not isinstance(scale, FloatGrid) or scale.bits != 8:
        return False
    scales = torch.arange(256, dtype=torch.uint8).view(scale.torch_dtype).float().nan_to_num(0, 0, 0)
    products = grid.table().nan_to_num(0, 0, 0) * scales
    normal = products.abs() >= torch.finfo(torch.bfloat16).tiny
    return _narrow(torch.where(normal & products.isfinite(), products, 0))


def _narrow(table: Tensor) -> bool:
    """Whether bfloat16 holds every value."""
    finite = table.nan_to_num(0, 0, 0)
    return torch.equal(finite.bfloat16().float(), finite)
