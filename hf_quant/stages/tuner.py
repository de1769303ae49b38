"""Tuner: which codes, fitted for several sites together against what their unit computes? (AdaRound, BRECQ, TIAR)"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.qtensor import QTensor
from hf_quant.sites import Site
from hf_quant.spec import Spec
from hf_quant.stages.sampler import Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one forward


class Chain(nn.Module):
    """Modules that run one after the other in the model, each on the hidden states of the one before.

    Called with the call of the first module, and those of the others without their hidden states.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, first: Call, *rest: Call) -> Any:  # noqa: ANN401
        """What the last module returns."""
        out = self.parts[0](*first[0], **first[1])
        for part, (more, named) in zip(list(self.parts)[1:], rest, strict=True):
            out = part(out if isinstance(out, Tensor) else out[0], *more, **named)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Sites that are fitted together.

    Attributes:
        name: unique in the model, for progress and resume.
        module: computes what is to be kept. A block, the whole model, a `Chain` of blocks, or an adapter over the
            model's own submodules (the temporal block of a diffusion model: timesteps -> every projection of them).
        sites: name in the model -> the submodule whose weight is fitted. A site may be in several units, one after
            the other: each begins at what the one before gave it.
        calls: what to feed `module`, a call a micro-batch; None: whatever the data feeds it.
    """

    name: str
    module: nn.Module
    sites: Mapping[str, nn.Module]
    calls: tuple[Call, ...] | None = None


class Units(Protocol):
    """Cuts a model into units, in the order in which they are fitted."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch]
    ) -> list[Unit]:
        """The units; a site in none keeps the solver's codes. `model` is float, and `blocks` are in order.

        Called without batches while the run is planned, and with them before it begins.
        """


def _unit(model: nn.Module, name: str, module: nn.Module, sites: Sequence[Site]) -> Unit:
    return Unit(name, module, {s.name: model.get_submodule(s.name) for s in sites})


@dataclass(frozen=True, slots=True)
class BlockUnits:
    """Every block is a unit."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """One a block that holds sites."""
        inside = {b: [s for s in sites if s.block == b] for b in blocks}
        return [_unit(model, b, model.get_submodule(b), found) for b, found in inside.items() if found]


@dataclass(frozen=True, slots=True)
class LayerUnits:
    """Every site is a unit of its own: its output is kept."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """One a site inside a block, in module order."""
        return [_unit(model, s.name, model.get_submodule(s.name), [s]) for s in sites if s.block]


@dataclass(frozen=True, slots=True)
class WindowUnits:
    """`size` consecutive blocks are a unit; the next begins `stride` blocks later and overlaps it."""

    size: int = 2
    stride: int = 1

    def __post_init__(self) -> None:
        if not (type(self.size) is type(self.stride) is int and 1 <= self.stride <= self.size):
            raise ConfigError(f"a window of size={self.size!r} moves by 1 .. size blocks, not stride={self.stride!r}")

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """One a window; windows stay inside a list of blocks (an encoder, a decoder)."""
        lists: dict[str, list[str]] = {}
        for block in blocks:
            lists.setdefault(block.rpartition(".")[0], []).append(block)
        found = []
        for whole in lists.values():
            for start in range(0, max(1, len(whole) - self.size + self.stride), self.stride):
                window = whole[start : start + self.size]
                inside = [s for s in sites if s.block in window]
                if inside:
                    chain = Chain([model.get_submodule(b) for b in window])
                    found.append(_unit(model, f"{window[0]}..{window[-1].rpartition('.')[2]}", chain, inside))
        return found


@dataclass(frozen=True, slots=True)
class ModelUnit:
    """The whole model is one unit: its output is kept."""

    def units(
        self, model: nn.Module, blocks: Sequence[str], sites: Sequence[Site], batches: Sequence[Batch] = ()
    ) -> list[Unit]:
        """One, of every linear site."""
        return [_unit(model, "model", model, [s for s in sites if s.kind != "embedding"])]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One cached micro-batch of a unit.

    Attributes:
        call: the unit's arguments on the quantized path.
        fp_call: those in full precision.
        target: what full precision makes of the latter, as `UnitLoss.remember` keeps it.
        weight: squared gradients of the model's loss at the unit's output, where the loss asks for them.
        entry_B: which entries of tables of input ranges its samples read, where there are tables.
        enter: tells layers of the unit that are not fitted themselves which samples are about to run.
    """

    call: Call
    fp_call: Call
    target: Tensor
    weight: Tensor | None = None
    entry_B: Tensor | None = None
    enter: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What is known of a site: its codes and, when its inputs have a static range, (scale, zero) of that."""

    q: QTensor
    inputs: Spec | None = None
    input_range: tuple[Tensor, Tensor | None] | None = None


class UnitLoss(Protocol):
    """How far a unit's output is from what full precision computes."""

    @property
    def gradients(self) -> bool:
        """Whether it reads `Example.weight`."""

    def remember(self, out: Tensor) -> Tensor:
        """What is cached of a full-precision output."""

    def loss(self, out: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """A scalar, the mean over the tokens of a micro-batch."""


class Tuner(Protocol):
    """Fits the rounding of a unit's weights, and the static ranges of its inputs, by gradient."""

    @property
    def loss(self) -> UnitLoss:
        """What it minimizes; tells the loop what to cache."""

    def refuses(self, weights: Spec, inputs: Spec | None) -> str | None:
        """None when it can fit such a layer, else the reason (asked at plan time)."""

    def tune(
        self, unit: Unit, start: Mapping[str, Fitted], examples: Sequence[Example], seed: int
    ) -> dict[str, Fitted]:
        """Site name -> what it ends with. The unit's weights are float, and are left as they were found."""
