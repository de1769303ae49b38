"""SpinQuant: rotations learned for the rounded model, on the manifold of orthogonal matrices (arXiv:2405.16406).

    R1, R2 = argmin over orthogonal matrices of  loss(model rotated by R1, R2, its weights and activations rounded)
    A = G R^T - R G^T  (G the gradient),   R <- (I + lr/2 A)^-1 (I - lr/2 A) R          (Cayley: orthogonal again)

begun at random Hadamard matrices; R1 turns the residual stream, R2 the values of each layer. The input of the down
projection is transformed online. Then weights by GPTQ.

Shapes: R1 [D, D]; R2 [d, d] a layer.
Differs from the paper: G is taken per unit of its spectral norm, so that `lr` is an angle; weights are rounded while
rotations are learned (the paper's choice for GPTQ is activations only); keys and values are not quantized; where norms
subtract the mean, R1 stays random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.method import Paper, method
from hf_quant.plugins.transforms.quarot import RandomHadamard, rotated
from hf_quant.recipe import Recipe
from hf_quant.stages.transform import Anatomy, Loss, Rotations


@dataclass(frozen=True, slots=True)
class LearnedRotations:
    """`steps` steps of Cayley SGD with momentum, the angle falling linearly from `lr`."""

    steps: int = 60
    lr: float = 0.05
    momentum: float = 0.9
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < 1 or not 0 <= self.momentum < 1:
            raise ConfigError(f"{self}: at least one step, lr between 0 and 1, momentum from 0 to below 1")

    def rotate(self, anatomy: Anatomy, loss: Loss, seed: int) -> Rotations:
        """See `WholeTransform.rotate`."""
        start = RandomHadamard().rotate(anatomy, loss, seed)
        assert start.residual is not None  # noqa: S101  it always rotates the stream
        names = list(start.heads)
        fixed = [start.residual] if anatomy.centered else []
        learned = [*start.heads.values()] if anatomy.centered else [start.residual, *start.heads.values()]

        def of(matrices: list[Tensor]) -> Rotations:
            residual, *heads = [*fixed, *matrices]
            return Rotations(residual, dict(zip(names, heads, strict=True)), start.online)

        return of(cayley_sgd(learned, lambda Rs, i: loss(of(Rs), i), self.steps, self.lr, self.momentum))


def cayley_sgd(
    start: list[Tensor], loss: Callable[[list[Tensor], int], Tensor], steps: int, lr: float, momentum: float
) -> list[Tensor]:
    """Orthogonal float64 matrices that lower the loss; see the module."""
    Rs = [R.double() for R in start]
    velocity = [torch.zeros_like(R) for R in Rs]
    for i in range(steps):
        leaves = [R.float().requires_grad_() for R in Rs]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(leaves, i), leaves)
        angle = lr * (1 - i / steps)
        for j, (R, G) in enumerate(zip(Rs, gradients, strict=True)):
            A = G.double() @ R.T
            A = A - A.T
            velocity[j] = momentum * velocity[j] + A / torch.linalg.matrix_norm(A, 2).clamp_min(1e-12)
            step = (1 - momentum) * angle / 2 * velocity[j]
            eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
            Rs[j] = torch.linalg.solve(eye + step, (eye - step) @ R)
    return Rs


@method(
    "spinquant",
    paper=Paper("2405.16406", "SpinQuant: LLM Quantization with Learned Rotations"),
    domains={"llm"},
    claim="with 4-bit weights and activations, KL below that of random rotations on a model with outlier channels",
)
def spinquant(
    bits: int = 4,
    act_bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    damp: float = 0.01,
    solver: str = "gptq",
    steps: int = 60,
    lr: float = 0.05,
) -> Recipe:
    """QuaRot's recipe with learned rotations."""
    return rotated(LearnedRotations(steps, lr), bits, act_bits, group_size, symmetric, damp, 24, solver)
