"""Kept: vectors that stay in full precision (gains of norms, biases) may learn beside the rounded weights."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_quant.learning.shards import gathered


class Offset(nn.Module):
    """`v + rms(v) d`: d is learned in float32 and zero at first. Off: the vector as it was, which is the teacher's."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.on = True
        self.offset = nn.Parameter(torch.zeros_like(vector, dtype=torch.float32))
        self.unit = float(vector.detach().float().square().mean().sqrt())  # one learning rate for vectors of any size

    def forward(self, vector: Tensor) -> Tensor:
        """In the type of the vector."""
        return (vector.float() + self.unit * self.offset).to(vector.dtype) if self.on else vector


def offsets(model: nn.Module) -> dict[str, Offset]:
    """Parametrize every vector of a model; shared ones share an offset. Vectors of zeros stay as they are."""
    shared: dict[int, Offset] = {}
    named: dict[str, Offset] = {}
    vectors = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.dim() == 1]
    for path, vector in vectors:
        if vector.is_floating_point() and bool(vector.any()):
            offset = shared.setdefault(id(vector), Offset(vector))
            parametrize.register_parametrization(*_owner(model, path), offset, unsafe=True)
            named[path] = offset
    return named


@torch.no_grad()
def settled(model: nn.Module, named: dict[str, Offset]) -> dict[str, Tensor]:
    """What the vectors have become."""
    vectors = {}
    for path in named:
        owner, name = _owner(model, path)
        with gathered(owner):
            vectors[path] = getattr(owner, name).clone()
    return vectors


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name
