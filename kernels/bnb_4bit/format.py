"""`bnb-nf4/1` and `bnb-fp4/1`: 4-bit levels with one absolute maximum a block, byte for byte as in bitsandbytes."""

import torch
from torch import Tensor

from hf_quant.errors import UnsupportedSpec
from hf_quant.formats import Layer, PackedFormat, Tensors
from hf_quant.grids import DynamicGrid, FloatGrid, LevelGrid
from hf_quant.kernels.bnb_4bit.backend import BitsAndBytes
from hf_quant.kernels.bnb_4bit.gpu import Triton
from hf_quant.kernels.bnb_4bit.native import Native
from hf_quant.kernels.bnb_4bit.scales import NESTED_BLOCK, block_scales
from hf_quant.qtensor import QTensor

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# sign, two exponent bits, one mantissa bit: 0, 1/16, 8, 12, 4, 6, 2, 3 twelfths; code 8 is a second zero
FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Bnb4Bit(PackedFormat):
    """`W = level[code] * scale`, without an input type: activations stay as they are.

    bitsandbytes cuts the flattened weight into blocks. Only where a block divides the row is that the same as blocks
    within rows, and only that is held.

    Canonical tensors:
        qweight: uint8 `[N, K / 2]`, two codes a byte, the first in the high nibble.
        scale: float32 `[N, G]`, the absolute maximum of each block; or, doubly quantized, uint8 codes of
            `DynamicGrid`, with `nested_scale` float32 `[ceil(N G / 256)]` and `nested_offset` float32 `[1]`:
            `scale = decode(code) * nested_scale + nested_offset`.
    """

    def __init__(self, name: str, levels: tuple[float, ...]) -> None:
        """`levels` in the order of bitsandbytes' codes."""
        self.id = f"bnb-{name}/1"
        self.grid = LevelGrid(tuple(sorted(set(levels))))
        self._code_of_level = torch.tensor([levels.index(v) for v in self.grid.levels], dtype=torch.uint8)
        self._level_of_code = torch.tensor([self.grid.levels.index(v) for v in levels], dtype=torch.uint8)
        self.kernels = (Native(levels), BitsAndBytes(name), Triton(levels))
        super().__init__()

    def holds(self, layer: Layer) -> str | None:
        """This grid, in blocks of bitsandbytes' sizes that divide the row."""
        spec, K = layer.weights, layer.shape[1]
        if spec.grid != self.grid:
            return f"weights need the levels of {self.id}"
        if spec.zero != "none" or spec.index != "none" or spec.range != "static" or spec.outer:
            return "weights have stored scales that depend on nothing but the block, and no zero point"
        if spec.scale not in (FloatGrid("float32"), DynamicGrid()):
            return "scales are kept in float32 or as 8-bit dynamic codes"
        if spec.block[0] != 1 or spec.block[1] not in BLOCKS:
            return f"blocks of {spec.block}: bitsandbytes has (1, n) with n in {BLOCKS}"
        if K % spec.block[1]:
            return f"blocks of {spec.block[1]} do not divide rows of {K}: they would cross row ends"
        return None if layer.inputs is None else "inputs are not quantized with these weights"

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See the class."""
        (N, K), blocks = layer.shape, layer.weights.blocks(layer.shape)
        qweight: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"qweight": ((N, K // 2), torch.uint8)}
        if isinstance(layer.weights.scale, FloatGrid):
            return qweight | {"scale": (blocks, torch.float32)}
        return qweight | {
            "scale": (blocks, torch.uint8),
            "nested_scale": ((-(-blocks[0] * blocks[1] // NESTED_BLOCK),), torch.float32),
            "nested_offset": ((1,), torch.float32),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Level ranks to codes, two a byte.

        Raises:
            UnsupportedSpec: doubly quantized scales that do not come with their codes.
        """
        codes = self._code_of_level.to(q.codes.device)[q.codes.int()]
        qweight = {"qweight": codes[:, ::2] << 4 | codes[:, 1::2]}
        if isinstance(q.spec.scale, FloatGrid):
            return qweight | {"scale": q.scale.contiguous()}
        if q.nested is None:
            raise UnsupportedSpec(f"{self.id}: doubly quantized scales need a solver that quantizes them (bnb-nf4)")
        return qweight | dict(q.nested)

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`, but for FP4's second zero, which becomes the first."""
        qweight = tensors["qweight"]
        codes = self._level_of_code.to(qweight.device)[torch.stack((qweight >> 4, qweight & 15), -1).flatten(1).int()]
        nested = {n: t for n, t in tensors.items() if n != "qweight"} if "nested_scale" in tensors else None
        return QTensor(codes, block_scales(tensors), None, layer.weights, layer.shape, nested)


FORMATS = (Bnb4Bit("nf4", NF4), Bnb4Bit("fp4", FP4))
