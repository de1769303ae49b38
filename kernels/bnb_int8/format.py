"""`bnb-int8/1`: the weights of bitsandbytes' LLM.int8 (arXiv 2208.07339), and what it does to inputs."""

import torch
from torch import Tensor

from hf_quant.formats import Layer, PackedFormat, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.kernels.bnb_int8.backend import THRESHOLD, BitsAndBytes
from hf_quant.kernels.bnb_int8.gpu import Triton
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec

WEIGHTS = Spec(grid=IntGrid(8, signed=True), scale=FloatGrid("float32"))
INPUTS = act_spec(8)


class BnbInt8(PackedFormat):
    """`W = qweight * scale`; inputs below the threshold are 8-bit tokens, columns with a larger one stay as they are.

    Canonical tensors:
        qweight: int8 `[N, K]`, as in bitsandbytes.
        scale: float32 `[N, 1]`, bitsandbytes' row maximum / 127.
    """

    id = "bnb-int8/1"
    priority = -10  # only when a method names it: which columns are kept depends on the batch
    kernels = (BitsAndBytes(), Triton())

    def holds(self, layer: Layer) -> str | None:
        """Exactly LLM.int8: symmetric 8-bit rows with float32 scales, symmetric 8-bit tokens."""
        if layer.weights != WEIGHTS:
            return "weights need symmetric 8-bit rows with float32 scales"
        return None if layer.inputs == INPUTS else "inputs need symmetric 8-bit tokens"

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See the class."""
        return {"qweight": (layer.shape, torch.int8), "scale": ((layer.shape[0], 1), torch.float32)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """Codes as signed values (they differ in the top bit)."""
        return {"qweight": (q.codes ^ 0x80).view(torch.int8), "scale": q.scale.contiguous()}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`."""
        codes = tensors["qweight"].view(torch.uint8) ^ 0x80
        return QTensor(codes, tensors["scale"].float(), None, layer.weights, layer.shape)

    def round_input(self, x_TK: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Columns where any token reaches the threshold as they are; the rest in steps of the token's maximum / 127.

        The maximum is over the token's values below the threshold, of x in float16: as bitsandbytes has it.
        """
        half = x_TK.half().float()
        large = half.abs() >= THRESHOLD
        small = half.masked_fill(large, 0)
        top = small.abs().amax(1, keepdim=True) if x_TK.numel() else small[:, :1]
        steps = (small * (127.0 / top)).round().nan_to_num(0) * (top / 127)  # a token of zeros has no step
        return torch.where(large.any(0), x_TK, steps.to(x_TK.dtype))


FORMATS = (BnbInt8(),)
