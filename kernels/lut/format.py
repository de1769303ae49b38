"""`lut-group/1`: codes into a table that everybody knows. `codebook-group/1`: codes into tables stored beside them."""

import torch
from torch import Tensor

from hf_quant.formats import Kernel, Layer, PackedFormat, Tensors
from hf_quant.grids import CodebookGrid, FloatGrid, TableGrid
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits, words
from hf_quant.kernels.lut.cpu import CodebookCpu, TableCpu
from hf_quant.kernels.lut.decode import table_grid, unpack
from hf_quant.kernels.lut.gpu import CodebookTriton, Triton
from hf_quant.kernels.lut.native import CodebookNative, Native
from hf_quant.kernels.lut.rotated import RotatedInput
from hf_quant.kernels.lut.scales import Layout, check_scales, pack_scales, refuses, scale_layout
from hf_quant.qtensor import QTensor
from hf_quant.runtime import activation


class LutGroup(PackedFormat):
    """`W = table[code] * scale [* tensor_scale]`, maybe rotated: NF4, MXFP4, NVFP4, every ExMy, any table of up to 256.

    Canonical tensors, for codes of b bits that stand for v values each:
        qweight: int32 `[N, ceil(K / v * b / 32)]`, each row a bit stream of codes (see `int-group/1`).
        scale: `[nb, kb]` in the type of `spec.scale`; powers of two as uint8, the exponent plus 127.
        tensor_scale: float32 `[1]`; only when the spec has one.
    """

    id = "lut-group/1"
    kernels: tuple[Kernel, ...] = (Native(), TableCpu(), Triton(), RotatedInput())

    def holds(self, layer: Layer) -> str | None:
        """Grids with a table, blocks of any shape, float scales, no zero point."""
        spec = layer.weights
        if not isinstance(spec.grid, TableGrid):
            return f"weights need a grid with a table, not {type(spec.grid).__name__}"
        if layer.shape[1] % spec.grid.vector:
            return f"codes of {spec.grid.vector} values do not divide rows of {layer.shape[1]}"
        if spec.rotation is not None and (reason := spec.rotation.refuses(layer.shape[1])):
            return reason
        return refuses(spec) or activation.refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> Layout:
        """See the class."""
        grid, (N, K) = table_grid(layer), layer.shape
        return scale_layout(layer) | {"qweight": ((N, words(K // grid.vector, grid.code_bits)), torch.int32)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Codes as a bit stream."""
        return pack_scales(q) | {"qweight": pack_bits(q.codes, table_grid(Layer(q.shape, q.spec)).code_bits)}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        return unpack(tensors, layer)

    def rows(self, ids_T: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Unpacks the rows asked for and nothing else."""
        if layer.weights.block[0] not in (1, -1):
            return super().rows(ids_T, tensors, layer)
        scale = tensors["scale"]
        own = {"qweight": tensors["qweight"][ids_T], "scale": scale[ids_T] if scale.shape[0] > 1 else scale}
        return self.unpack({**tensors, **own}, Layer((len(ids_T), layer.shape[1]), layer.weights)).dequantize()

    def check(self, tensors: Tensors, layer: Layer) -> str | None:
        """Also: no code beyond the table, or of a pattern that is no value."""
        if (reason := super().check(tensors, layer) or check_scales(tensors)) is not None:
            return reason
        grid = table_grid(layer)
        table = grid.table()
        if len(table) == 1 << grid.code_bits and bool(table.isfinite().all()):
            return None
        codes = self.unpack(tensors, layer).codes
        if int(codes.max()) >= len(table) or not bool(table.isfinite().all(1).to(codes.device)[codes.int()].all()):
            return "qweight holds codes that stand for no value"
        return None


class CodebookGroup(PackedFormat):
    """`W = codebook[block, code]`: levels fitted to each block (k-means, SqueezeLLM).

    Canonical tensors, for codes of b bits:
        qweight: int32 `[N, ceil(K b / 32)]`, each row a bit stream of codes.
        codebook: `[nb, kb * 2^b]` in the type of `spec.scale`, the levels of one block after the other, each ascending.
    """

    id = "codebook-group/1"
    kernels: tuple[Kernel, ...] = (CodebookNative(), CodebookCpu(), CodebookTriton())

    def holds(self, layer: Layer) -> str | None:
        """Stored codebooks of a float type of at least two bytes, blocks of any shape."""
        spec = layer.weights
        if not isinstance(spec.grid, CodebookGrid):
            return f"weights need codebooks of their own, not {type(spec.grid).__name__}"
        if isinstance(spec.scale, FloatGrid) and spec.scale.bits < 16:
            return f"levels are kept in a type of 16 bits or more, not {spec.scale.dtype}"
        if spec.outer:
            return "the levels carry the scale, there is none for the tensor, and no rotation"
        return refuses(spec) or activation.refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> Layout:
        """See the class."""
        grid, scale = _codebook_grids(layer)
        nb, kb = layer.weights.blocks(layer.shape)
        return {
            "codebook": ((nb, kb << grid.bits), scale.torch_dtype),
            "qweight": ((layer.shape[0], words(layer.shape[1], grid.bits)), torch.int32),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Codes as a bit stream, levels in their stored type (exact: they lie on that grid)."""
        grid, scale = _codebook_grids(Layer(q.shape, q.spec))
        assert q.codebook is not None  # noqa: S101  an invariant of QTensor
        return {"codebook": scale.encode(q.codebook.flatten(1)), "qweight": pack_bits(q.codes, grid.bits)}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        grid, _ = _codebook_grids(layer)
        codes = unpack_bits(tensors["qweight"], grid.bits, layer.shape[1])
        codebook = tensors["codebook"].float().unflatten(1, (-1, 1 << grid.bits))
        ones = torch.ones(codebook.shape[:2], device=codes.device)
        return QTensor(codes, ones, None, layer.weights, layer.shape, codebook=codebook)

    def rows(self, ids_T: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Unpacks the rows asked for and nothing else."""
        if layer.weights.block[0] not in (1, -1):
            return super().rows(ids_T, tensors, layer)
        book = tensors["codebook"]
        own = {"qweight": tensors["qweight"][ids_T], "codebook": book[ids_T] if book.shape[0] > 1 else book}
        return self.unpack(own, Layer((len(ids_T), layer.shape[1]), layer.weights)).dequantize()


def _codebook_grids(layer: Layer) -> tuple[CodebookGrid, FloatGrid]:
    grid, scale = layer.weights.grid, layer.weights.scale
    assert isinstance(grid, CodebookGrid)  # noqa: S101  `holds` has checked both
    assert isinstance(scale, FloatGrid)  # noqa: S101
    return grid, scale


FORMATS = (LutGroup(), CodebookGroup())
