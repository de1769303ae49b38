"""Temporal: what of a denoiser depends on its timestep (and class) alone, found by watching one forward.

    temporal(y = f(x_1, x_2, ...))  <=>  some x_i is temporal, and every other x_j is temporal or a constant

Every call of a torch function and of a quantizable layer is written down; what only timestep and classes led to can
then be run by itself. Names and classes of modules play no part, so U-Nets and transformers are treated alike.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_quant.capture import run_as_it_is
from hf_quant.runtime.clock import NAME as TIMESTEP
from hf_quant.stages.sampler import Batch

CONDITIONS = (TIMESTEP, "class_labels")


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of a temporal value among those of one run."""

    at: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One call. Temporal tensors among its arguments are slots; all else is constant."""

    call: Callable[..., Any]
    site: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[int, ...]


class TemporalBlock(nn.Module):
    """The temporal part of a network, run by itself: conditions `[B]` each -> what its last layers put out, `[B, F]`.

    B is the number of rows that were watched: the network may have made constants of that size.
    """

    def __init__(self, sites: Mapping[str, nn.Module], tape: "_Tape", given: Sequence[str], rows: int) -> None:
        super().__init__()
        self.tape = tuple(tape.steps), frozenset(tape.escaped)
        self.ends, self.steps = _ends(*self.tape)
        self.sites = {s.site: sites[s.site] for s in self.steps if s.site is not None}
        self.parts = nn.ModuleList(self.sites.values())
        self.given, self.rows = tuple(given), rows
        calls = Counter(s.site for s in tape.steps)
        self.storable = [name for name in self.ends if calls[name] == 1 and name not in tape.mixed_sites]
        self.elsewhere = frozenset(tape.mixed_sites)

    def forward(self, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The outputs of the layers that the rest of the network reads, side by side."""
        return torch.cat([v.flatten(1) for v in self.features(timestep, class_labels).values()], 1)

    def features(self, timestep: Tensor, class_labels: Tensor | None = None) -> dict[str, Tensor]:
        """The same by layer."""
        values: dict[int, Any] = dict(enumerate((timestep, class_labels)))  # as they stand in `CONDITIONS`
        for step in self.steps:
            out = step.call(*_filled(step.args, values), **_filled(step.kwargs, values))
            values.update(zip(step.out, _tensors(out), strict=True))
        return {name: values[end] for name, end in self.ends.items()}

    def needless(self, stored: Collection[str]) -> list[str]:
        """The layers that nothing needs when what these put out is stored; they themselves are not among them."""
        steps, wanted = self.tape[0], set(self.tape[1])
        needed = {*stored, *self.elsewhere}
        for step in reversed(steps):
            if wanted & set(step.out) and step.site not in stored:
                wanted |= {s.at for s in _slots((step.args, step.kwargs))}
                needed.add(step.site or "")
        return list(dict.fromkeys(s.site for s in steps if s.site is not None and s.site not in needed))

    def conditions(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Every combination in the batches, once, in calls of `rows`; the last call is filled up with its last row."""
        rows = [torch.stack([_per_row(b, name, len(_sample(b))).double() for name in self.given], 1) for b in batches]
        every = torch.cat(rows).unique(dim=0)
        every = torch.cat([every, every[-1:].expand(-len(every) % self.rows, -1)])
        types = [batches[0][name].dtype for name in self.given]
        return [{name: part[:, i].to(types[i]) for i, name in enumerate(self.given)} for part in every.split(self.rows)]


@torch.no_grad()
def temporal_block(model: nn.Module, sites: Sequence[str], batch: Batch) -> TemporalBlock | None:
    """The temporal part of a network, None when it has none.

    Args:
        model: takes a `timestep`.
        sites: names of its quantizable layers.
        batch: one batch of its inputs.
    """
    given = [name for name in CONDITIONS if name in batch]
    if TIMESTEP not in given:
        return None
    rows = len(_sample(batch))
    device = next(model.parameters()).device
    inputs = {n: _per_row(batch, n, rows).to(device) if n in given else v.to(device) for n, v in batch.items()}
    tape = _Tape()
    for name in given:
        tape.add(inputs[name])
    tape.mixed.update(id(v) for n, v in inputs.items() if n not in given)
    with ExitStack() as stack:
        for name in sites:
            stack.enter_context(tape.site(name, model.get_submodule(name)))
        with tape:
            tape.read(run_as_it_is(model, inputs, device))
    ran = [s.site for s in tape.steps if s.site is not None]
    if not ran:
        return None
    return TemporalBlock({n: model.get_submodule(n) for n in ran}, tape, given, rows)


class _Tape(TorchFunctionMode):
    """Writes down the calls of a forward that are temporal."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.slots: dict[int, Slot] = {}  # id of a temporal tensor
        self.mixed: set[int] = set()  # ids of what other inputs led to
        self.mixed_sites: set[str] = set()  # sites that have made some of it
        self.escaped: set[int] = set()  # slots that the rest of the network reads
        self.alive: list[Any] = []  # so that an id means one tensor
        self.inside = 0

    def add(self, value: Tensor) -> int:
        slot = self.slots[id(value)] = Slot(len(self.alive))
        self.alive.append(value)
        return slot.at

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's own signature
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self.note(func, None, args, dict(kwargs or {}), out)
        return out

    def note(self, call: Callable[..., Any], site: str | None, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ANN401
        made, read = list(_tensors(out)), list(_tensors((args, kwargs)))
        if not made:
            return
        self.alive += [*made, *read]
        if any(id(x) in self.mixed for x in read):
            self.read(read)
            self.mixed_sites |= set() if site is None else {site}
            self.mixed.update(id(x) for x in made)
            for x in made:
                self.slots.pop(id(x), None)  # written into by something that is not temporal
        elif any(id(x) in self.slots for x in read):
            args, kwargs = self._slotted(args), self._slotted(kwargs)
            self.steps.append(Step(call, site, args, kwargs, tuple(self.add(x) for x in made)))

    def read(self, value: Any) -> None:  # noqa: ANN401
        """Something that is not temporal reads it, or the network puts it out."""
        self.escaped |= {self.slots[id(x)].at for x in _tensors(value) if id(x) in self.slots}

    def _slotted(self, value: Any) -> Any:  # noqa: ANN401  nested arguments of any kind
        if isinstance(value, Tensor):
            return self.slots.get(id(value), value.detach())
        if isinstance(value, dict):
            return {k: self._slotted(v) for k, v in value.items()}
        return type(value)(self._slotted(v) for v in value) if type(value) in (tuple, list) else value

    def site(self, name: str, module: nn.Module) -> ExitStack:
        """Its calls are one step each while this lasts."""

        def before(*_: Any) -> None:  # noqa: ANN401
            self.inside += 1

        def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:  # noqa: ANN401
            self.inside -= 1
            if not self.inside:
                self.note(module, name, args, kwargs, out)

        stack = ExitStack()
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        return stack


def _ends(steps: Sequence[Step], escaped: Collection[int]) -> tuple[dict[str, int], list[Step]]:
    """The last sites before what the rest of the network reads, each with the slot it fills; and all they need."""
    wanted, ends = set(escaped), dict[str, int]()
    for step in reversed(steps):
        if wanted & set(step.out):
            if step.site is None:
                wanted |= {s.at for s in _slots((step.args, step.kwargs))}
            else:
                ends.setdefault(step.site, step.out[0])
    wanted, kept = set(ends.values()), list[Step]()
    for step in reversed(steps):
        if wanted & set(step.out):
            kept.append(step)
            wanted |= {s.at for s in _slots((step.args, step.kwargs))}
    return dict(reversed(ends.items())), kept[::-1]


def _leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401  nested arguments of any kind
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    return (v for v in _leaves(value) if isinstance(v, Tensor))


def _slots(value: Any) -> Iterator[Slot]:  # noqa: ANN401
    return (v for v in _leaves(value) if isinstance(v, Slot))


def _filled(value: Any, values: Mapping[int, Any]) -> Any:  # noqa: ANN401
    if isinstance(value, Slot):
        return values[value.at]
    if isinstance(value, dict):
        return {k: _filled(v, values) for k, v in value.items()}
    return type(value)(_filled(v, values) for v in value) if type(value) in (tuple, list) else value


def _sample(batch: Batch) -> Tensor:
    return next(v for n, v in batch.items() if n not in CONDITIONS and not n.startswith("@"))


def _per_row(batch: Batch, name: str, rows: int) -> Tensor:
    value = batch[name].reshape(-1)
    return value.expand(rows) if len(value) == 1 else value
