"""What every format's kernel on the C++ product shares."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.formats import ALONE, Around, Layer, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels._cpu import float32, layout, native
from hf_quant.kernels._cpu.layout import Kind
from hf_quant.kernels._cpu.memory import room
from hf_quant.products import operand
from hf_quant.runtime.activation import fake_quantize
from hf_quant.spec import Spec

SLICE = 1 << 19  # weights unpacked at once
LONGEST_SUM = (2**31 - 1) // (255 * 128)  # products of 8-bit codes that an int32 always holds


class NativeKernel(ABC):
    """A `Restoring`, `Describing` kernel on CPU. Its blob is that of `native.multiply`."""

    name: ClassVar[str] = "native-cpu"
    replaces: ClassVar[tuple[str, ...]] = ("qweight",)

    @abstractmethod
    def takes(self, layer: Layer) -> str | None:
        """None when the product can be told such a layer, else the reason why not."""

    @abstractmethod
    def codes(self, qweight: Tensor, layer: Layer) -> Tensor:
        """Some rows of `qweight` -> codes, uint8 `[rows, K]`."""

    @abstractmethod
    def stored(self, codes_NK: Tensor, layer: Layer) -> Tensor:
        """Inverse of `codes`."""

    @abstractmethod
    def ranges(self, tensors: Tensors, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
        """(scales, zero points in codes), float32 `[N or 1, G]`; None: all are 1, or the middle one."""

    def tensor_scale(self, tensors: Tensors) -> Tensor:
        """A scale of all weights, float32 `[1]`, or empty."""
        return torch.empty(0)

    def kind(self, layer: Layer) -> Kind:
        """How its codes meet tokens."""
        if integer_tokens(layer.inputs):
            return "integers4" if layer.weights.grid.bits <= 4 else "integers8"
        return "levels4" if layer.weights.grid.bits <= 4 else "bytes8"

    def values(self, tensors: Tensors, layer: Layer) -> Tensor:
        """What codes stand for where a table says so: `[16 or 256]`, or `[N or 1, G, 16]`."""
        return torch.arange(16.0) - self.middle(layer)

    def middle(self, layer: Layer) -> int:
        """The code that stands for 0 where no zero points are."""
        return 1 << (int(layer.weights.grid.bits) - 1)

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """See `Kernel.supports`."""
        if device.type != "cpu":
            return f"runs on cpu, not {device.type}"
        if (reason := self.takes(layer)) is not None:
            return reason
        kind = self.kind(layer)
        integers = kind.startswith("integers")
        kinds = (
            (torch.bfloat16,) if kind == "rows4" else (torch.bfloat16, torch.float32)
        )  # levels of rows lie in bfloat16
        if dtype not in kinds:
            return f"fast in {' and '.join(str(k).removeprefix('torch.') for k in kinds)} only, not {dtype}"
        group, K = layer.weights.block_size(layer.shape)[1], layer.shape[1]
        inputs = layout.block(kind)[1]
        if group < K and group % inputs:
            return f"needs groups in multiples of {inputs} inputs, not of {group}"
        if integers and K > LONGEST_SUM:
            return f"sums of more than {LONGEST_SUM} products can overflow, and there are {K} inputs"
        return native.why_not()

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """See `native.multiply`."""
        (N, K), kind = layer.shape, self.kind(layer)
        integers, (outputs, inputs), down = kind.startswith("integers"), layout.block(kind), _rounded(N)
        words = room(down // outputs, -(-K // inputs), outputs * inputs * int(kind[-1]) // 8)
        step = _rounded(max(1, SLICE // K))
        for first in range(0, N, step):  # whole matrices of codes would leave holes in the heap
            codes = self.codes(tensors["qweight"][first : first + step], layer)
            codes = codes - self.middle(layer) if kind == "bytes8" else codes
            words[first // outputs : (first + step) // outputs] = layout.pack(codes, kind)
        scale, zero = self.ranges(tensors, layer)
        scale = torch.empty(0) if scale is None else scale
        shift = torch.empty(0) if zero is None else self.middle(layer) - zero
        table = sums = torch.empty(0)
        if integers and layer.inputs is not None and layer.inputs.zero != "none":
            sums = self._sums(tensors, layer, scale, shift)
        if kind == "rows4":
            table = native.table(by_strip(self.values(tensors, layer), N), kind)
        elif kind in ("levels4", "scaled4", "floats4", "levels8"):
            table = native.table(self.values(tensors, layer), kind)
        shift = by_strip(shift, N) if bool(shift.any()) else torch.empty(0)
        return [words, by_strip(scale, N) if scale.numel() else scale, shift, table, sums, self.tensor_scale(tensors)]

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """See `Restoring.restore`."""
        step = _rounded(max(1, SLICE // layer.shape[1])) // layout.block(self.kind(layer))[0]
        parts = [self.stored(self.unpacked(part, layer), layer) for part in blob[0].split(step)]
        return {"qweight": torch.cat(parts)[: layer.shape[0]].contiguous()}

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Kernel.run`."""
        return self.fused(x_TK, tensors, blob, layer, ALONE)

    def fuses(self, layer: Layer) -> frozenset[str]:
        """See `Fusing.fuses`: where tokens become integers, each with the range of its timestep."""
        return frozenset({"entry_T"}) if self.kind(layer).startswith("integers") else frozenset()

    def fused(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, around: Around) -> Tensor:
        """See `Fusing.fused`."""
        kind, group, middle, grid = _facts(self, layer.key)
        ranges = None
        if grid is None:
            x_TK = rounded(x_TK, layer.inputs, tensors)
        elif "input_scale" in tensors:
            ranges = static_ranges(tensors, around.entry_T, len(x_TK))
        if grid is None and x_TK.dtype == torch.float32 and native.wide():
            return float32.multiply(x_TK, blob, layer.shape[0], kind, group, middle)
        return native.multiply(x_TK.contiguous(), blob, layer.shape[0], kind, group, middle, x_TK.dtype, grid, ranges)

    def describe(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> tuple[tuple[int | None, str], ...]:
        """See `Describing.describe`."""
        kind, number = self.kind(layer), "bfloat16" if native.wide() else "float32"
        of = f"products of {'integers' if kind.startswith('integers') else number}"
        if of.endswith("bfloat16") and dtype == torch.float32:
            return (
                (None, "products of float32, the weight decoded some columns at a time")
                if kind == "floats4"
                else (None, "three products of bfloat16 a number, codes decoded once"),
            )
        held = "codes as they are" if kind == "integers8" and native.wide() else "codes decoded once, into the cache"
        if native.tiled():
            held = f"in tiles of 16 x 16, {held}"
        elif held == "codes as they are":
            return ((None, f"{of}, {held}"),)
        return (native.few(kind), f"{of}, codes decoded in registers"), (None, f"{of}, {held}")

    def unpacked(self, words: Tensor, layer: Layer) -> Tensor:
        """Some of the blob's words -> codes, at most K columns."""
        kind = self.kind(layer)
        codes = layout.unpack(words, kind)
        codes = codes + self.middle(layer) if kind == "bytes8" else codes
        return codes if codes.shape[1] < layer.shape[1] else codes[:, : layer.shape[1]]

    def _sums(self, tensors: Tensors, layer: Layer, scale: Tensor, shift: Tensor) -> Tensor:
        """Of the dequantized rows, float32 `[N']`."""
        (N, K), group = layer.shape, layer.weights.block_size(layer.shape)[1]
        found, index = torch.zeros(_rounded(N)), torch.arange(K) // group
        for first in range(0, N, step := max(1, SLICE // K)):
            rows = slice(first, min(first + step, N))
            W = self.codes(tensors["qweight"][rows], layer).float() - self.middle(layer)
            own = [(t if len(t) == 1 else t[rows])[:, index] for t in (scale, shift) if t.numel()]
            W = W + own[1] if len(own) > 1 else W
            found[rows] = (W * own[0]).sum(1)
        return found


class WithGradient(NativeKernel):
    """One whose weight `native.dense` knows: `Differentiating`."""

    def gradient(self, grad_TN: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """See `Differentiating.gradient`: some columns of the weight at a time."""
        kind, group, middle, _ = _facts(self, layer.key)
        (N, K), grad = layer.shape, operand(grad_TN)
        grad_TK = grad_TN.new_empty(grad_TN.shape[0], K)
        for some in float32.columns(N, K):
            W_KN = native.dense(blob, N, some, kind, group, middle, grad_TN.dtype)
            grad_TK[:, some] = grad @ W_KN.to(grad.dtype).T
        return grad_TK


def _rounded(N: int) -> int:
    """The outputs that blocks have."""
    return -(-N // layout.OUTPUTS) * layout.OUTPUTS


@cache
def _facts(kernel: NativeKernel, key: str) -> tuple[Kind, int, int, native.Grid | None]:
    """(kind, columns of a group, the middle code, grid of tokens): a call should not ask for them again."""
    layer = Layer.from_key(key)
    group, kind = layer.weights.block_size(layer.shape)[1], kernel.kind(layer)
    inputs = layer.inputs if kind.startswith("integers") else None
    grid = None if inputs is None else token_grid(inputs)
    return kind, group if group < layer.shape[1] else 1 << 40, kernel.middle(layer), grid


def integer_tokens(inputs: Spec | None) -> bool:
    """Whether the product is one of integers: tokens of at most 8 bits with one scale each."""
    if inputs is None or not isinstance(inputs.grid, IntGrid) or inputs.grid.bits > 8:
        return False
    if inputs.scale != FloatGrid("float32") or inputs.block[1] != -1 or inputs.power != 1 or inputs.zero == "float":
        return False
    return inputs.zero == "int" or inputs.grid.low < 0


def token_grid(spec: Spec) -> native.Grid:
    """Where the product puts tokens itself."""
    assert isinstance(spec.grid, IntGrid)  # noqa: S101  `integer_tokens`
    return native.Grid(spec.grid.low, spec.grid.high, spec.zero == "int")


def rounded(x_TK: Tensor, spec: Spec | None, tensors: Tensors) -> Tensor:
    """`fake_quantize`, in one pass where tokens become integers with several scales each."""
    if spec is None or spec.range != "dynamic" or not integer_tokens(replace(spec, block=(1, -1))):
        return fake_quantize(x_TK, spec, tensors)
    K, width = x_TK.shape[1], spec.block_size((x_TK.shape[0], x_TK.shape[1]))[1]
    padded = F.pad(x_TK, (0, -K % width)).contiguous()  # 0 is in every range
    codes, scale, zero = native.quantize(padded.view(padded.numel() // width, width), token_grid(spec))
    values = codes.float() if zero is None else codes.float().sub_(zero[:, None])
    return values.mul_(scale[:, None]).to(x_TK.dtype).view(padded.shape)[:, :K]


def static_ranges(tensors: Tensors, entry_T: Tensor | None, tokens: int) -> native.Ranges:
    """The static range of every token: the one there is, or that of its row of the table."""

    def of(name: str) -> Tensor | None:
        if (table := tensors.get(name)) is None:
            return None
        return (table.expand(tokens) if entry_T is None else table[entry_T]).float().contiguous()

    scale = of("input_scale")
    assert scale is not None  # noqa: S101  asked where there is one
    return scale, of("input_zero_point")


def by_strip(blocks: Tensor, N: int) -> Tensor:
    """`[N or 1, G, ...]` -> `[N' / 16, G, 16, ...]`, in bfloat16 where that holds every value."""
    rows = blocks.new_zeros(_rounded(N), *blocks.shape[1:])
    rows[:N] = blocks
    padded = rows.view(-1, layout.OUTPUTS, *blocks.shape[1:]).transpose(1, 2).contiguous()
    narrow = padded.bfloat16()
    return narrow if torch.equal(narrow.float(), padded) else padded.float()
