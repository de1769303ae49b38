"""StandIn: a module whose matrices are linear layers, in the place of one whose matrices are not.

A stand-in computes what the module it stands in for computes, through one `nn.Linear` a matrix. Statistics, solvers,
formats, kernels, saving and loading then need no special case.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor, nn

Part = Literal["weight", "bias"]


class StandIn(nn.Module, ABC):
    """Has the forward of another module, and its matrices as `nn.Linear` (later `QuantLinear`) children."""

    stock_weight: ClassVar[str]  # name of a weight of the module it stands in for, as stock checkpoints have it

    @classmethod
    @abstractmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether it can stand in for the module."""

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> "StandIn":
        """A stand-in for the module, sharing its storage."""

    @abstractmethod
    def put_back(self) -> nn.Module:
        """The module it stands in for, with the logical weights of the children (inverse of `of` for float ones)."""

    @abstractmethod
    def members(self, name: str, value: Tensor) -> Iterator[tuple[str, Part, Tensor]]:
        """(path of the child, which of its parameters, value) of all that a stock parameter holds."""
