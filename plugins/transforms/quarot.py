"""QuaRot: rotations spread outliers over all channels and leave what the model computes (arXiv:2404.00456).

    h <- h R1            the residual stream: what reads a norm of gain g W <- W diag(g) R1, what writes W <- R1^T W
    v <- v R2            the values of every head; the output projection back
    x <- x R4 (online)   the input of the down projection, while the model runs; W <- W R4

with random Hadamard matrices R = diag(+-1) H / sqrt(n). Then weights by GPTQ in searched ranges, inputs rounded by
the token.

Shapes: R1 [D, D]; R2 [d, d] for a head of width d; x_TK, W_NK.
Differs from the paper: keys and values are not quantized, so queries and keys are not rotated; the output projection's
input is rotated within heads (and over all of them, online, with `online_heads`); of a width without a Hadamard matrix
blocks are rotated; where norms subtract the mean, R1 is a random orthogonal matrix that keeps the vector of ones, so
that they stay as they are.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.hadamard import Hadamard
from hf_quant.method import Paper, method
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.objective import LayerMse
from hf_quant.stages.solver import Nearest
from hf_quant.stages.transform import Anatomy, Loss, Rotations, WholeTransform


@dataclass(frozen=True, slots=True)
class RandomHadamard:
    """Random Hadamard matrices everywhere; `online_heads`: those of values are rotated over all heads, online."""

    online_heads: bool = False
    learns: ClassVar[bool] = False

    def rotate(self, anatomy: Anatomy, loss: Loss, seed: int) -> Rotations:
        """See `WholeTransform.rotate`."""
        heads = {} if self.online_heads else {n: Hadamard.of_width(d).matrix(d) for n, (_, d) in anatomy.heads.items()}
        online = {n: Hadamard.of_width(K, seed) for n, K in anatomy.inner.items() if n not in heads}
        return Rotations(residual_rotation(anatomy, seed), heads, online)


def residual_rotation(anatomy: Anatomy, seed: int) -> Tensor:
    """A random Hadamard matrix of the stream's width, or an orthogonal one that keeps the vector of ones."""
    D = anatomy.width
    if not anatomy.centered:
        return Hadamard.of_width(D, seed).matrix(D)
    g = torch.Generator().manual_seed(seed)
    inner: Tensor = torch.block_diag(
        torch.ones(1, 1).double(), torch.linalg.qr(torch.randn(D - 1, D - 1, generator=g).double())[0]
    )
    u = torch.full((D, 1), D**-0.5, dtype=torch.float64)
    u[0] -= 1  # the reflection that takes the first axis to the ones
    P: Tensor = torch.eye(D).double() - 2 * u @ u.T / u.square().sum()
    return P @ inner @ P


def rotated(
    transform: WholeTransform,
    bits: int,
    act_bits: int,
    group_size: int,
    symmetric: bool,
    damp: float,
    clip_steps: int,
    solver: str,
) -> Recipe:
    """Rotated by `transform`, then weights by `solver` in searched ranges, inputs rounded by the token."""
    if solver not in ("gptq", "rtn"):
        raise ConfigError(f'solver={solver!r}: "gptq" or "rtn"')
    return Recipe(
        weights=int_spec(bits, group_size, symmetric=symmetric),
        inputs=act_spec(act_bits),
        transforms=(transform,),
        range=MseClip(steps=clip_steps, floor=0.5, power=2.0),
        objective=LayerMse() if solver == "gptq" else None,
        solver=Gptq(damp=damp) if solver == "gptq" else Nearest(),
    )


@method(
    "quarot",
    paper=Paper("2404.00456", "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"),
    domains={"llm"},
    claim="with 4-bit weights and activations, KL below a tenth of rtn's on a model with outlier channels",
)
def quarot(
    bits: int = 4,
    act_bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    damp: float = 0.01,
    clip_steps: int = 24,
    online_heads: bool = False,
    solver: str = "gptq",
) -> Recipe:
    """Rotate, then round weights (by `solver`, "gptq" or "rtn") in searched ranges and inputs a token."""
    return rotated(RandomHadamard(online_heads), bits, act_bits, group_size, symmetric, damp, clip_steps, solver)
