"""The transform on GPUs: sums and differences of a row in registers, one pass over memory (`_gemm/tokens.py`)."""

from math import gcd
from typing import ClassVar

from torch import Tensor

from hf_quant.kernels._gemm import machine

LARGEST = 16384  # values of a block that one program holds


class Triton:
    """Orders that are powers of two; others have no butterflies."""

    name: ClassVar[str] = "triton"

    def supports(self, x: Tensor, size: int) -> str | None:
        """Where Triton runs."""
        order = gcd(size, x.shape[-1])
        if order & (order - 1) or not 2 <= order <= LARGEST:
            return f"orders of a power of two from 2 to {LARGEST}, not {order}"
        return machine.refuses(x.device, x.dtype)

    def run(self, x: Tensor, size: int, seed: int | None, inverse: bool) -> Tensor:
        """See `op.Kernel.run`. H is symmetric; signs are taken before it, or after it for the inverse."""
        from hf_quant.kernels._gemm.quantized import Transform, rotate, signs_of

        K = x.shape[-1]
        own = None if seed is None else signs_of(K, seed, x.device)
        x_MK = x.reshape(-1, K)
        y_MK = rotate(x_MK, Transform(gcd(size, K), None if inverse else own))
        if inverse and own is not None:
            y_MK = y_MK * own.to(y_MK.dtype)
        return y_MK.reshape(x.shape)
