"""Stats: what a stage needs to know about the inputs of a site. Values that describe a sum, a max or a sample.

A state is a dict of tensors, each merged by the reduction that `reduce` names. Sums are kept in float64 over
float32 partial results of one micro-batch, so merging the parts of several processes gives the same state as one
process that saw all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hf_quant.errors import ConfigError

TILE = 256  # of a Gram matrix: large enough for a fast product, small enough to skip most of the lower triangle

State = dict[str, Tensor]
Reduction = Literal["sum", "max", "min", "sample"]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one micro-batch shows of a site.

    Attributes:
        x_TK: its input on the quantized path.
        fp_TK: the same tokens on the full-precision path; None unless a statistic has `two_streams`.
        tags: what is known of each token besides, `[T]` each: "timestep", "position", "modality", "weight", ...
    """

    x_TK: Tensor
    fp_TK: Tensor | None = None
    tags: Mapping[str, Tensor] = field(default_factory=dict)


class Stat(Protocol):
    """A statistic of a site's input. Frozen and hashable: equal stats are captured once."""

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """How each tensor of the state is merged; "sample": rows that go with the state's `key` (see `Rows`)."""

    @property
    def two_streams(self) -> bool:
        """True: it needs the full-precision inputs of the same tokens as well."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Names of the tags it reads; a tag that no batch carries is an error at plan time."""

    def start(self, K: int, device: torch.device) -> State:
        """The state before any token was seen."""

    def update(self, state: State, seen: Seen) -> None:
        """Add one micro-batch."""


def merge(stat: Stat, a: State, b: State) -> State:
    """The state that one process seeing both parts would have. Commutative; exact (see the module docstring)."""
    ops: dict[Reduction, Callable[[Tensor, Tensor], Tensor]] = {
        "sum": torch.add,
        "max": torch.maximum,
        "min": torch.minimum,
    }
    merged = {name: ops[how](a[name], b[name]) for name, how in stat.reduce.items() if how != "sample"}
    sampled = [name for name, how in stat.reduce.items() if how == "sample"]
    if sampled:
        first = torch.cat([a["key"], b["key"]]).argsort(stable=True)[: len(a["key"])]
        merged |= {name: torch.cat([a[name], b[name]])[first] for name in sampled}
    return merged


@dataclass(frozen=True, slots=True)
class Gram:
    """`xx = sum x^T x` and the token count; `H_KK = (2 / N) xx` (the 2/N of GPTQ, METHODS trap 6).

    Only the upper triangle of `xx` is kept up; what lies below has no meaning.
    """

    reduce: ClassVar[Mapping[str, Reduction]] = {"xx": "sum", "count": "sum"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        return {
            "xx": torch.zeros(K, K, dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.float64, device=device),
        }

    def update(self, state: State, seen: Seen) -> None:
        """Add `x^T x`."""
        x = seen.x_TK.float()
        for begin in range(0, x.shape[1], TILE):  # the upper triangle; `hessian` mirrors it
            state["xx"][begin : begin + TILE, begin:] += x[:, begin : begin + TILE].T @ x[:, begin:]
        state["count"] += x.shape[0]


@dataclass(frozen=True, slots=True)
class CrossGram:
    """`dx = sum (fp - x)^T x`: how the inputs of the quantized path differ from full precision (GPTAQ)."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"dx": "sum"}
    two_streams: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        return {"dx": torch.zeros(K, K, dtype=torch.float64, device=device)}

    def update(self, state: State, seen: Seen) -> None:
        """Add `(fp - x)^T x`."""
        assert seen.fp_TK is not None  # noqa: S101  two_streams is True
        x = seen.x_TK.float()
        state["dx"] += (seen.fp_TK.float() - x).T @ x


@dataclass(frozen=True, slots=True)
class DriftGram:
    """`dd = sum (fp - x)^T (fp - x)`: the energy of that difference (CoreQ)."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"dd": "sum"}
    two_streams: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        return {"dd": torch.zeros(K, K, dtype=torch.float64, device=device)}

    def update(self, state: State, seen: Seen) -> None:
        """Add `(fp - x)^T (fp - x)`."""
        assert seen.fp_TK is not None  # noqa: S101  two_streams is True
        d = seen.fp_TK.float() - seen.x_TK.float()
        state["dd"] += d.T @ d


@dataclass(frozen=True, slots=True)
class AbsMax:
    """Per-channel `max |x|`."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"max": "max"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        return {"max": torch.zeros(K, device=device)}

    def update(self, state: State, seen: Seen) -> None:
        """Running maximum."""
        state["max"] = torch.maximum(state["max"], seen.x_TK.abs().amax(0).float())


@dataclass(frozen=True, slots=True)
class MinMax:
    """Smallest and largest value of the whole input (static activation ranges)."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"min": "min", "max": "max"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros: a range always includes zero."""
        return {"min": torch.zeros((), device=device), "max": torch.zeros((), device=device)}

    def update(self, state: State, seen: Seen) -> None:
        """Running extremes."""
        state["min"] = torch.minimum(state["min"], seen.x_TK.amin().float())
        state["max"] = torch.maximum(state["max"], seen.x_TK.amax().float())


@dataclass(frozen=True, slots=True)
class Moments:
    """Per-channel sums of |x| and x^2 and the token count: mean magnitudes (AWQ), energies."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"abs": "sum", "square": "sum", "count": "sum"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        zeros = torch.zeros(K, dtype=torch.float64, device=device)
        return {"abs": zeros, "square": zeros.clone(), "count": zeros.new_zeros(())}

    def update(self, state: State, seen: Seen) -> None:
        """Add the micro-batch."""
        x = seen.x_TK.float()
        state["abs"] += x.abs().sum(0)
        state["square"] += x.square().sum(0)
        state["count"] += x.shape[0]


@dataclass(frozen=True, slots=True)
class Mean:
    """Per-channel sum of x and the token count: what a layer's bias has to make up for."""

    reduce: ClassVar[Mapping[str, Reduction]] = {"sum": "sum", "count": "sum"}
    two_streams: ClassVar[bool] = False
    tags: ClassVar[tuple[str, ...]] = ()

    def start(self, K: int, device: torch.device) -> State:
        """Zeros."""
        zeros = torch.zeros(K, dtype=torch.float64, device=device)
        return {"sum": zeros, "count": zeros.new_zeros(())}

    def update(self, state: State, seen: Seen) -> None:
        """Add the micro-batch."""
        state["sum"] += seen.x_TK.float().sum(0)
        state["count"] += seen.x_TK.shape[0]

    def value(self, state: State) -> Tensor:
        """`E[x]`, float32 `[K]`."""
        return (state["sum"] / state["count"].clamp_min(1)).float()


@dataclass(frozen=True, slots=True)
class Drift(Mean):
    """The same of `fp - x`: how far the quantized path has moved a layer's input, on average."""

    two_streams: ClassVar[bool] = True

    def update(self, state: State, seen: Seen) -> None:
        """Add the micro-batch."""
        assert seen.fp_TK is not None  # noqa: S101  two_streams is True
        Mean.update(self, state, replace(seen, x_TK=seen.fp_TK.float() - seen.x_TK.float()))


EMPTY = torch.iinfo(torch.int64).max  # the key of a row that was never filled


@dataclass(frozen=True, slots=True)
class Rows:
    """A uniform sample of the inputs themselves, for stages whose error is not a quadratic form (activation rounding).

    The `count` rows with the smallest content hash: which rows these are does not depend on the order or the process
    in which they were seen, so merging is exact. Repeated rows count once.
    """

    count: int = 1024
    two_streams: bool = False
    tags: ClassVar[tuple[str, ...]] = ()

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """All of it is sampled together."""
        return dict.fromkeys(("key", "x", "fp") if self.two_streams else ("key", "x"), "sample")

    def start(self, K: int, device: torch.device) -> State:
        """Unfilled rows."""
        rows = {name: torch.zeros(self.count, K, device=device) for name in self.reduce if name != "key"}
        return {"key": torch.full((self.count,), EMPTY, device=device), **rows}

    def update(self, state: State, seen: Seen) -> None:
        """Keep the smallest keys of what was kept and what is new."""
        x = seen.x_TK.float().contiguous()
        new = {"key": _hash_rows(x), "x": x}
        if self.two_streams:
            assert seen.fp_TK is not None  # noqa: S101  two_streams is True
            new["fp"] = seen.fp_TK.float()
        state.update(merge(self, state, new))

    def values(self, state: State, name: str = "x") -> Tensor:
        """The rows that were filled."""
        return state[name][state["key"] != EMPTY]


def _hash_rows(x_TK: Tensor) -> Tensor:
    """A well-mixed int64 of the bits of each row (wrapping arithmetic, the same on every device)."""
    odd = torch.arange(1, 2 * x_TK.shape[1], 2, device=x_TK.device) * 0x9E3779B97F4A7C1
    key = (x_TK.view(torch.int32).long() * odd).sum(1)
    key = (key ^ (key >> 29)) * 0x5851F42D4C957F2D
    return (key ^ (key >> 32)).clamp_max(EMPTY - 1)


@dataclass(frozen=True, slots=True)
class ByIndex:
    """A statistic for each value of a tag: every tensor of its state gains a leading axis `[entries]`.

    `seen` tells which entries any token reached; a table fitted from it gives the others their nearest neighbour.
    """

    stat: Stat
    index: str
    entries: int

    def __post_init__(self) -> None:
        if "sample" in self.stat.reduce.values():
            raise ConfigError("rows are sampled for all values of an index together, not by index")

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """As the inner statistic."""
        return {**self.stat.reduce, "seen": "max"}

    @property
    def two_streams(self) -> bool:
        """As the inner statistic."""
        return self.stat.two_streams

    @property
    def tags(self) -> tuple[str, ...]:
        """Those of the inner statistic and the index."""
        return (*self.stat.tags, self.index)

    def start(self, K: int, device: torch.device) -> State:
        """The inner start for every entry."""
        inner = self.stat.start(K, device)
        state = {name: t.expand(self.entries, *t.shape).clone() for name, t in inner.items()}
        return state | {"seen": torch.zeros(self.entries, device=device)}

    def update(self, state: State, seen: Seen) -> None:
        """Split the tokens by their tag."""
        at_T = seen.tags[self.index]
        for entry in at_T.unique().tolist():
            of = at_T == entry
            part = Seen(
                seen.x_TK[of],
                None if seen.fp_TK is None else seen.fp_TK[of],
                {name: tag[of] for name, tag in seen.tags.items()},
            )
            inner = {name: tensor[entry] for name, tensor in state.items() if name != "seen"}
            self.stat.update(inner, part)
            for name, tensor in inner.items():
                state[name][entry] = tensor
            state["seen"][entry] = 1


@dataclass(frozen=True, slots=True)
class Weighted:
    """A statistic of second order (Gram, CrossGram) in which each token counts by its tag "weight" (mean 1)."""

    stat: Stat

    @property
    def reduce(self) -> Mapping[str, Reduction]:
        """As the inner statistic."""
        return self.stat.reduce

    @property
    def two_streams(self) -> bool:
        """As the inner statistic."""
        return self.stat.two_streams

    @property
    def tags(self) -> tuple[str, ...]:
        """Those of the inner statistic and the weight."""
        return (*self.stat.tags, "weight")

    def start(self, K: int, device: torch.device) -> State:
        """As the inner statistic."""
        return self.stat.start(K, device)

    def update(self, state: State, seen: Seen) -> None:
        """Scale each token by the root of its weight."""
        root = seen.tags["weight"].float().sqrt()[:, None]
        fp = None if seen.fp_TK is None else seen.fp_TK.float() * root
        self.stat.update(state, replace(seen, x_TK=seen.x_TK.float() * root, fp_TK=fp))


Stats = Mapping[Stat, State]


def hessian(stats: Stats) -> Tensor:
    """`H_KK = (2 / N) X X^T` in float32."""
    gram = stats[Gram()]
    upper = gram["xx"].triu()
    return ((upper + upper.triu(1).T) * (2.0 / gram["count"].clamp_min(1))).float()
