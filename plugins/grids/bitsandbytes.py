"""bitsandbytes' data-free formats: NF4 and FP4 (QLoRA, arXiv:2305.14314) and LLM.int8 (arXiv:2208.07339).

    NF4, FP4:  w = level[code] * max|w_block|        LLM.int8:  w = code * max|W_n| / 127

The bytes are those bitsandbytes itself writes; it runs them when it is installed, our reference does otherwise.

Shapes: W_NK weight; blocks of consecutive values along K for NF4 and FP4, one scale a row for LLM.int8.
Differs from the paper: blocks do not cross the ends of rows, so their size has to divide K.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_quant.errors import ConfigError, UnsupportedSpec
from hf_quant.grids import DynamicGrid, FloatGrid, LevelGrid
from hf_quant.kernels.bnb_4bit.format import BLOCKS, FORMATS
from hf_quant.kernels.bnb_4bit.scales import NESTED_BLOCK
from hf_quant.kernels.bnb_int8.format import INPUTS, WEIGHTS
from hf_quant.method import Paper, method
from hf_quant.qtensor import QTensor, as_blocks, expand
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import Range

QLORA = Paper("2305.14314", "QLoRA: Efficient Finetuning of Quantized LLMs")
LLM_INT8 = Paper("2208.07339", "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale")
TINY = 1e-38  # bitsandbytes' guard for blocks of zeros


@dataclass(frozen=True, slots=True)
class NearestLevel:
    """`code = nearest level to W * (1 / absmax)`, in bitsandbytes' order of operations.

    With double quantization the codes are still chosen for the exact absolute maxima, as in QLoRA; these then become
    `scale = decode(code) * nested_scale + offset`, with the mean as offset and one nested scale in 256.
    """

    def refuses(self, spec: Spec) -> str | None:
        """Levels only."""
        return None if isinstance(spec.grid, LevelGrid) else "bitsandbytes' 4-bit rounding takes a table of levels"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """The range stage has nothing to choose here: scales are absolute maxima."""
        shape = (W_NK.shape[0], W_NK.shape[1])
        absmax = as_blocks(W_NK, spec).abs().amax(-1)
        steps = (W_NK.float() * expand(1.0 / absmax.clamp_min(TINY), spec, shape)).clamp(-1, 1)
        codes = spec.grid.encode(steps)
        if isinstance(spec.scale, FloatGrid):
            return QTensor(codes, absmax, None, spec, shape)
        scale, nested = quantize_scales(absmax)
        return QTensor(codes, scale, None, spec, shape, nested)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute maxima `[N, G]` -> (their stored value, what is stored of them)."""
    offset = absmax.mean()
    flat = (absmax - offset).flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    grid = DynamicGrid()
    codes = grid.encode(blocks * (1.0 / top.clamp_min(TINY)))
    value = (grid.decode(codes) * top).flatten()[: flat.numel()].view_as(absmax) + offset
    stored = {
        "scale": codes.flatten()[: flat.numel()].view_as(absmax).contiguous(),
        "nested_scale": top.flatten(),
        "nested_offset": offset.reshape(1),
    }
    return value, stored


@dataclass(frozen=True, slots=True)
class NearestRow:
    """`code = round(W * (127 / absmax))` of the weight in float16, one absolute maximum a row."""

    def refuses(self, spec: Spec) -> str | None:
        """The weights of LLM.int8 only."""
        return None if spec == WEIGHTS else "LLM.int8 takes symmetric 8-bit rows with float32 scales"

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        """The range stage has nothing to choose here.

        Raises:
            UnsupportedSpec: a weight that float16 cannot hold.
        """
        half = W_NK.half().float()
        if not bool(torch.isfinite(half).all()):
            raise UnsupportedSpec("LLM.int8 keeps weights in float16 on the way, and some are larger than 65504")
        absmax = half.abs().amax(1, keepdim=True)
        codes = spec.grid.encode((half * (127.0 / absmax)).nan_to_num(0))  # a row of zeros has no step
        return QTensor(codes, absmax / 127, None, spec, (W_NK.shape[0], W_NK.shape[1]))


def _four_bits(position: int, blocksize: int, double_quant: bool) -> Recipe:
    if blocksize not in BLOCKS:
        raise ConfigError(f"blocksize={blocksize!r}: bitsandbytes has {', '.join(map(str, BLOCKS))}")
    scale = DynamicGrid() if double_quant else FloatGrid("float32")
    fmt = FORMATS[position]
    spec = Spec(grid=fmt.grid, block=(1, blocksize), scale=scale)
    return Recipe(weights=spec, solver=NearestLevel(), format=fmt.id)


@method("bnb-nf4", paper=QLORA, domains={"llm", "vit", "vlm", "diffusion"}, claim="lower weight error than bnb-fp4")
def bnb_nf4(blocksize: int = 64, double_quant: bool = False) -> Recipe:
    """4-bit NormalFloat: the levels are quantiles of the normal distribution."""
    return _four_bits(0, blocksize, double_quant)


@method(
    "bnb-fp4", paper=QLORA, domains={"llm", "vit", "vlm", "diffusion"}, claim="lower weight error than rtn at 3 bits"
)
def bnb_fp4(blocksize: int = 64, double_quant: bool = False) -> Recipe:
    """4-bit float: one sign, two exponent bits, one mantissa bit."""
    return _four_bits(1, blocksize, double_quant)


@method(
    "bnb-int8",
    paper=LLM_INT8,
    domains={"llm", "vit", "vlm"},
    claim="lower output error than plain 8-bit tokens when a few input channels are large",
)
def bnb_int8() -> Recipe:
    """LLM.int8: 8-bit weights and tokens, with columns of inputs above 6 in full precision."""
    return Recipe(weights=WEIGHTS, inputs=INPUTS, solver=NearestRow(), format="bnb-int8/1")
