"""Block floats and 8-bit floats: MXFP4 and MXFP8 (arXiv:2310.10537), NVFP4 (arXiv:2509.25149), FP8 (arXiv:2209.05433).

    MX:     w = e2m1[code] * 2^(floor(log2 max|w_block|) - 2), blocks of 32 (E4M3 elements: - 8)
    NVFP4:  w = e2m1[code] * e4m3 * s,  s = max|W| / (6 * 448),  blocks of 16
    FP8:    w = e4m3[code] * max|w_block| / 448

Shapes: W_NK weight; scale `[N, K / 32]`, `[N, K / 16]`, or one a tensor, a row, or 128 x 128 weights.
Differs from the paper: these are weight formats applied after training, inputs in the same format only on request;
inputs of MX have the nearest power of two of max|x| / 6 as scale; inputs of NVFP4 have no second scale. Elements
beyond the largest saturate.
"""

from dataclasses import dataclass
from math import floor, log2
from typing import Any

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.grids import E4M3, FloatGrid, MiniFloatGrid
from hf_quant.method import Paper, method
from hf_quant.qtensor import as_blocks, round_scale
from hf_quant.recipe import Recipe
from hf_quant.spec import Spec

MX = Paper("2310.10537", "Microscaling Data Formats for Deep Learning")
NV = Paper("2509.25149", "Pretraining Large Language Models with NVFP4")
FP8 = Paper("2209.05433", "FP8 Formats for Deep Learning")
EVERYWHERE = {"llm", "vit", "vlm", "moe", "mamba", "diffusion"}
E2M1 = MiniFloatGrid(2, 1)
GRANULARITY = {"tensor": (-1, -1), "channel": (1, -1), "block": (128, 128)}


@dataclass(frozen=True, slots=True)
class SharedExponent:
    """OCP's rule: the largest magnitude of a block gets the exponent of the largest element, `2^floor(log2 max)`."""

    def fit(self, W_NK: Tensor, spec: Spec, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Range.fit`."""
        assert isinstance(spec.grid, MiniFloatGrid)  # noqa: S101  the methods below have no other
        top = as_blocks(W_NK, spec).abs().amax(-1)
        exponent = (top.view(torch.int32) >> 23) - 127 - floor(log2(spec.grid.high))
        scale = ((exponent + 127).clamp_min(1) << 23).view(torch.float32)
        return round_scale(torch.where(top > 0, scale, 0.0), spec), None


def _inputs(weights: Spec) -> Spec:
    return Spec(grid=weights.grid, block=(1, weights.block[1]), index="token", scale=weights.scale, range="dynamic")


def _mx(grid: MiniFloatGrid, act: bool) -> Recipe:
    weights = Spec(grid=grid, block=(1, 32), scale=FloatGrid("float8_e8m0fnu"))
    return Recipe(weights=weights, inputs=_inputs(weights) if act else None, range=SharedExponent())


@method("mxfp4", paper=MX, domains=EVERYWHERE, claim="KL below symmetric 4-bit integers a row, at 4.25 bits a weight")
def mxfp4(act: bool = False) -> Recipe:
    """E2M1 in blocks of 32 with powers of two as scales; `act`: inputs too."""
    return _mx(E2M1, act)


@method("mxfp8", paper=MX, domains=EVERYWHERE, claim="KL below a tenth of mxfp4's")
def mxfp8(act: bool = False) -> Recipe:
    """E4M3 in blocks of 32 with powers of two as scales; `act`: inputs too."""
    return _mx(E4M3, act)


@method("nvfp4", paper=NV, domains=EVERYWHERE, claim="KL below mxfp4's, at 4.5 bits a weight")
def nvfp4(act: bool = False) -> Recipe:
    """E2M1 in blocks of 16 with E4M3 scales and one float32 scale a tensor; `act`: inputs too."""
    weights = Spec(grid=E2M1, block=(1, 16), scale=FloatGrid("float8_e4m3fn"), tensor_scale=True)
    return Recipe(weights=weights, inputs=_inputs(weights) if act else None)


@method("fp8", paper=FP8, domains=EVERYWHERE, claim="KL below static 8-bit integers' on a model with outlier channels")
def fp8(granularity: str = "channel", act: str = "token") -> Recipe:
    """E4M3 weights, a scale a "tensor", "channel" or "block" of 128 x 128; inputs "token", "static" or "none"."""
    if granularity not in GRANULARITY:
        raise ConfigError(f"granularity={granularity!r}: one of {list(GRANULARITY)}")
    common: dict[str, Any] = {"grid": E4M3, "scale": FloatGrid("float32")}
    inputs = {
        "token": Spec(**common, index="token", range="dynamic"),
        "static": Spec(**common, block=(-1, -1)),
        "none": None,
    }
    if act not in inputs:
        raise ConfigError(f"act={act!r}: one of {list(inputs)}")
    return Recipe(weights=Spec(**common, block=GRANULARITY[granularity]), inputs=inputs[act])
