"""Activation quantization of a layer's input: dynamic ranges from the tokens, static ones from stored tensors."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_quant.grids import IntGrid, MiniFloatGrid
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest, round_scale
from hf_quant.spec import Spec


def timed(spec: Spec | None) -> bool:
    """Whether the range is a table by timestep: then the layer rounds its input itself, and kernels see no spec."""
    return spec is not None and spec.index == "timestep" and spec.range == "static"


def refuses(spec: Spec | None) -> str | None:
    """None when inputs can be quantized so at run time, else the reason why not."""
    if spec is None:
        return None
    if not isinstance(spec.grid, IntGrid | MiniFloatGrid):
        return f"inputs need integers or small floats, not a {type(spec.grid).__name__}"
    if spec.zero == "float" or (spec.zero == "int" and not isinstance(spec.grid, IntGrid)):
        return "inputs take an integer zero point (on integers) or none"
    if spec.outer:
        return "inputs take no scale for the whole tensor besides their own, and no rotation of theirs"
    if spec.index not in ("none", "token") and not timed(spec):
        return f"inputs indexed by {spec.index} need a table of scales"
    if spec.range == "static" and spec.block != (-1, -1):
        return f"static inputs have one scale for the whole tensor, not blocks of {spec.block}"
    if spec.power != 1 and (spec.block[1] != -1 or not isinstance(spec.grid, IntGrid)):
        return f"inputs with scales for columns are integers with one for each token, not {spec}"
    if spec.range == "dynamic" and spec.block[0] != 1:
        return f"dynamic inputs need their own scale for each token, not blocks of {spec.block}"
    return None


def input_layout(spec: Spec | None, K: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of what a layer keeps for its K inputs: a static scale, or that of every column."""
    if spec is None or not spec.stored:
        return {}
    size = spec.entries if spec.range == "static" else K
    scale: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"input_scale": ((size,), torch.float32)}
    return scale | ({"input_zero_point": ((spec.entries,), torch.int32)} if spec.zero == "int" else {})


def pack_input(scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
    """What was fitted (`[entries, 1]` scales, or `[1, K]`, and zeros or None) -> the tensors of `input_layout`."""
    tensors = {"input_scale": scale.detach().reshape(-1).float()}
    return tensors if zero is None else tensors | {"input_zero_point": zero.detach().reshape(-1).int()}


def check_input(spec: Spec | None, tensors: Mapping[str, Tensor]) -> str | None:
    """None when loaded input tensors are usable, else what is wrong."""
    if "input_scale" in tensors and not bool((tensors["input_scale"] > 0).all()):
        return "input_scale is not positive"
    if spec is not None and "input_zero_point" in tensors and isinstance(spec.grid, IntGrid):
        for zero in tensors["input_zero_point"].tolist():
            if not spec.grid.low <= zero <= spec.grid.high:
                return f"input_zero_point {zero} is outside {spec.grid.low} .. {spec.grid.high}"
    return None


def quantize_input(x_TK: Tensor, spec: Spec, tensors: Mapping[str, Tensor]) -> QTensor:
    """Codes of the tokens: each token has its own scale (dynamic), or all share `input_scale` (static).

    With `spec.power` below 1 they are codes of `x / input_scale`: what a token is worth still has the columns' scales
    to come.
    """
    if spec.power != 1:
        assert isinstance(spec.grid, IntGrid)  # noqa: S101  `refuses` has checked it
        peak_T1 = x_TK.float().abs().amax(1, keepdim=True) if x_TK.shape[1] else x_TK.new_zeros(len(x_TK), 1).float()
        scale = round_scale(peak_T1.pow(spec.power) / spec.grid.high, spec)
        return nearest(x_TK.float() / tensors["input_scale"].float(), scale, None, spec)
    if spec.range == "static":
        scale, zero = tensors["input_scale"].float().reshape(-1, 1), None
        if spec.zero == "int":
            zero = tensors["input_zero_point"].float().reshape(-1, 1)
    else:
        blocks = as_blocks(x_TK, spec)
        scale, zero = from_extremes(blocks.amin(-1), blocks.amax(-1), spec)
    return nearest(x_TK, scale, zero, spec)


def fake_quantize(x_TK: Tensor, spec: Spec | None, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x_TK` rounded onto its grid, in x's type; unchanged when `spec` is None."""
    if spec is None:
        return x_TK
    q = quantize_input(x_TK, spec, tensors)
    return q.dequantize(x_TK.dtype) if spec.power == 1 else (q.dequantize() * tensors["input_scale"]).to(x_TK.dtype)


def round_by_entry(x_TK: Tensor, spec: Spec, tensors: Mapping[str, Tensor], entry_T: Tensor) -> Tensor:
    """`x_TK` rounded with row `entry_T` (int64 `[T]`) of its table of ranges; gradients pass straight through."""
    own = replace(spec, block=(1, -1), index="token", entries=1)
    rows = {name: tensors[name][entry_T] for name in ("input_scale", "input_zero_point") if name in tensors}
    rounded = fake_quantize(x_TK.detach(), own, rows)
    return x_TK + (rounded - x_TK.detach()) if torch.is_grad_enabled() and x_TK.requires_grad else rounded
