"""Transform: what function-preserving rewrite first? A transform returns a value; `rewriting/rewrite.py` folds it.

A `Transform` looks at one group of layers after the other, block by block, with statistics; a `PairTransform` at a
group with the layer before it; an `OnlineTransform` at the input of any group; a `JoinTransform` at one that was put
together of several tensors. A `WholeTransform` looks at the anatomy of the model, once, before the first block. None
sees a module tree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from hf_quant.hadamard import Hadamard
from hf_quant.spec import Spec
from hf_quant.stages.range import Range
from hf_quant.stats import Stat, Stats


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """`x_k -> (x_k - z_k) / s_k`: column k of every weight that reads it times `s_K[k]`, `W z` into their biases.

    Where nothing before the group can take it (an `OnlineTransform` is asked there, too), it is done while the model
    runs. Channels that carry the same value (shared by several query heads) get their geometric mean of s, their mean
    of z.
    """

    s_K: Tensor
    z_K: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rotations:
    """Orthogonal rewrites of a whole model; gains (and means) of norms are folded into their readers before.

    Attributes:
        residual: `h -> h R` of the residual stream, `[D, D]`; None: it stays as it is.
        heads: first site of a group that reads the values of attention -> the rotation of its heads, `[d, d]` for all
            or `[H, d, d]`, one for each head of the producer.
        online: first site of a group -> the rotation of its input while the model runs.
    """

    residual: Tensor | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    online: Mapping[str, Hadamard] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Online:
    """`x -> x + t` at the input of a group's layers while the model runs; its effect is taken out of their outputs."""

    shift_K: Tensor


Rewrite = Diagonal | Rotations | Online


@runtime_checkable
class Transform(Protocol):
    """Looks at one group of sites that read the same input, and proposes a rewrite."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads, of the full-precision input."""

    def propose(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """The rewrite for the group's weights `[N_i, K]`, or None to leave it as it is."""


@runtime_checkable
class PairTransform(Protocol):
    """Looks at a layer and the group that reads it, where scales may pass between them.

    It is asked again, pair by pair, until it proposes nothing more (or often enough).
    """

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads, of what lies between them."""

    def pair(
        self, producer_KJ: Tensor, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | None:
        """The rewrite for the producer's rows (one for each input channel of the group) and the group's weights."""


@runtime_checkable
class OnlineTransform(Protocol):
    """Looks at the input of any group, and proposes what to do to it while the model runs."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads, of that input."""

    def online(
        self, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None, fit: Range
    ) -> Diagonal | Online | None:
        """The rewrite, or None to leave it as it is. A `Diagonal` costs nothing where something before can take it."""


@runtime_checkable
class JoinTransform(Protocol):
    """Looks at the input of a group that a concatenation put together (the skip connections of a U-Net)."""

    @property
    def needs(self) -> tuple[Stat, ...]:
        """The statistics it reads, of that input."""

    def join(
        self, parts_K: Tensor, Ws: Sequence[Tensor], stats: Stats, weights: Spec, inputs: Spec | None
    ) -> Diagonal | None:
        """The rewrite, or None. `parts_K` numbers the part that each input channel came from."""

    def weights(self, parts_K: Tensor, weights: Spec, inputs: Spec | None) -> Spec:
        """How the group's weights are quantized: with other blocks, where those of the recipe lie across parts."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What can be rotated in a model.

    Attributes:
        width: D, of the residual stream.
        centered: its norms subtract the mean, so its rotation must keep the vector of ones (`rewrite.keep_ones`).
        heads: first site of each group that reads values -> (heads of the producer, head width).
        inner: first site of every group that does not read the residual stream -> width of its input.
    """

    width: int
    centered: bool
    heads: Mapping[str, tuple[int, int]]
    inner: Mapping[str, int]


Loss = Callable[[Rotations, int], Tensor]  # (rotations, step) -> the loss of the rounded model on the step's batch


@runtime_checkable
class WholeTransform(Protocol):
    """Looks at the anatomy of a model, and proposes rotations."""

    @property
    def learns(self) -> bool:
        """Whether it calls the loss, so that calibration data is needed."""

    def rotate(self, anatomy: Anatomy, loss: Loss, seed: int) -> Rotations:
        """The rotations. `loss` is differentiable in them; the pipeline lends it, on the model as it was."""
