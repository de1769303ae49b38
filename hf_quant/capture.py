"""Capture: run a model block by block, and see what goes into every site.

A *chain* is a maximal run of blocks in which each block's hidden states are the previous block's output. Inside a
chain only the hidden states travel; everything else a block is called with (masks, positions, encoder states) is
recorded once from a forward of the whole model. Where a chain breaks (an encoder ends, a decoder begins) the model
is run again, so any architecture works without a table of its own. Blocks that do not run on the data (a vision tower,
on text) are in no chain.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import CalibrationError, HfQuantError, UnsupportedModel
from hf_quant.finite import require_numbers
from hf_quant.left_products import left_products
from hf_quant.products import widened
from hf_quant.stages.sampler import Batch, model_inputs_of, token_tags
from hf_quant.stats import Seen, Stat, State
from hf_quant.streams import Inputs, Routes, flat, same_routes

HIDDEN = "hidden_states"


@dataclass(slots=True, eq=False)
class Call:
    """How one block was called, without its hidden states."""

    keyword: str | None  # under which hidden states came; None: as the first positional argument
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def like(self, other: "Call") -> bool:
        """Whether the arguments are the same objects (or equal plain values)."""
        mine, theirs = ((*c.args, *c.kwargs.values()) for c in (self, other))
        if self.keyword != other.keyword or list(self.kwargs) != list(other.kwargs):
            return False
        pairs = zip(mine, theirs, strict=False)
        return len(self.args) == len(other.args) and all(
            a is b or (isinstance(a, int | float | str) and a == b) for a, b in pairs
        )

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """Call `block` the same way with other hidden states; returns its output hidden states."""
        args, kwargs = to_device((self.args, self.kwargs), device)
        hidden = hidden.to(device)
        with widened():
            out = block(hidden, *args, **kwargs) if self.keyword is None else block(**{self.keyword: hidden}, **kwargs)
        return first_tensor(out)


@dataclass(slots=True, eq=False)
class Recording:
    """One forward of the whole model a batch: the calls of every block and the inputs of each chain's first block."""

    chains: list[list[str]] = field(default_factory=list)
    calls: list[dict[str, Call]] = field(default_factory=list)  # [batch][block]
    starts: list[dict[str, Tensor]] = field(default_factory=list)  # [batch][first block of a chain]
    reached: set[str] = field(default_factory=set)  # sites that some token went into

    def uniform(self) -> bool:
        """Whether one chain of blocks was called with the very same arguments, so the first block's tell them all."""
        if len(self.chains) != 1:
            return False
        first, *others = (self.calls[0][name] for name in self.chains[0])
        return all(call.like(first) for call in others)

    def add_like_the_first(self, call: Call, start: Tensor) -> None:
        """One more batch of a uniform recording, of which only the first block was seen."""
        self.calls.append(dict.fromkeys(self.chains[0], call))
        self.starts.append({self.chains[0][0]: start})


def _first_call(model: nn.Module, name: str, batch: Batch, device: torch.device) -> tuple[Call, Tensor]:
    """How one block is called in a forward that goes no further, and the hidden states it is called with."""
    one = _Forward()

    def stop(*_: Any) -> None:  # noqa: ANN401
        raise _EnoughError

    block = model.get_submodule(name)
    handles = [
        block.register_forward_pre_hook(partial(one.before, name), with_kwargs=True),
        block.register_forward_pre_hook(stop),
    ]
    with suppress(_EnoughError):
        try:
            run_model(model, batch, device)
        finally:
            for handle in handles:
                handle.remove()
    return one.calls[name], one.starts[name]


class _EnoughError(Exception):
    """Ends a forward whose rest nobody needs."""


@dataclass(slots=True, eq=False)
class _Forward:
    """What the hooks of one forward write down."""

    calls: dict[str, Call] = field(default_factory=dict)
    starts: dict[str, Tensor] = field(default_factory=dict)
    chains: list[list[str]] = field(default_factory=list)
    outputs: dict[int, tuple[str, Tensor]] = field(default_factory=dict)  # by id, unique while the tensor lives

    def before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self.calls:
            raise UnsupportedModel(
                f"block {name} runs more than once in a forward, which block-wise capture cannot follow; "
                "use a method that needs no calibration data, such as rtn"
            )
        keyword = None if args else HIDDEN if HIDDEN in kwargs else next(iter(kwargs), HIDDEN)
        hidden = args[0] if keyword is None else kwargs.get(keyword)
        if not isinstance(hidden, Tensor):
            raise UnsupportedModel(
                f"block {name} is called with {type(hidden).__name__} in the place of hidden states, which block-wise "
                "capture cannot follow; use a method that needs no calibration data, such as rtn"
            )
        self.calls[name] = Call(keyword, args[1:], {k: v for k, v in kwargs.items() if k != keyword})
        if self.chains and self.outputs.get(id(hidden), ("", hidden))[0] == self.chains[-1][-1]:
            self.chains[-1].append(name)
        else:
            self.chains.append([name])
            self.starts[name] = hidden.detach().clone()

    def after(self, name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:  # noqa: ANN401
        hidden = first_tensor(out)
        self.outputs[id(hidden)] = name, hidden


def first_tensor(out: Any) -> Tensor:  # noqa: ANN401  whatever a block returns
    """The hidden states in a block's output: the first tensor of it."""
    parts = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else out.values()
    hidden = next((part for part in parts if isinstance(part, Tensor)), None)
    if hidden is None:
        raise UnsupportedModel(f"a block returned {type(out).__name__} without a tensor of hidden states")
    return hidden


def answer(out: Any) -> Tensor:  # noqa: ANN401  whatever a model returns
    """What a whole model puts out: its logits, or the first tensor that is no loss."""
    if isinstance(getattr(out, "logits", None), Tensor):
        found: Tensor = out.logits
        return found
    return first_tensor({n: v for n, v in out.items() if n != "loss"} if isinstance(out, Mapping) else out)


@torch.no_grad()
def record(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], device: torch.device, sites: Sequence[str] = ()
) -> Recording:
    """Run the model once a batch and write down how each block is called, and which of the sites are reached.

    Raises:
        UnsupportedModel: a block runs twice in one forward, or not on the same terms on every batch.
        CalibrationError: the model's forward refuses a batch.
    """
    recording = Recording()

    def see(name: str, x: Tensor) -> None:
        if x.numel():
            recording.reached.add(name)

    for index, batch in enumerate(batches):
        if recording.uniform() and recording.reached.issuperset(sites):
            recording.add_like_the_first(*_first_call(model, recording.chains[0][0], batch, device))
            continue
        one = _Forward()
        handles = []
        for name in blocks:
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(partial(one.before, name), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(one.after, name)))
        try:
            with watching(model, sites, see), running(model, batch, f"calibration batch {index}"):
                run_model(model, batch, device)
        finally:
            for handle in handles:
                handle.remove()
        if recording.chains and one.chains != recording.chains:
            raise UnsupportedModel(
                f"calibration batch {index} runs other blocks than those before it, or in another order: pass batches "
                "of one kind (all with images, or all without)"
            )
        recording.chains = one.chains
        recording.calls.append(one.calls)
        recording.starts.append(one.starts)
    return recording


@contextmanager
def running(model: nn.Module, batch: Batch, called: str) -> Iterator[None]:
    """What a model says of inputs that it does not take is a `CalibrationError`, which names what it was given."""
    try:
        yield
    except (HfQuantError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: a missing argument is often an AttributeError of None
        given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
        raise CalibrationError(f"{type(model).__name__} cannot run on {called} ({given}): {error}") from error


def run_model(model: nn.Module, batch: Batch, device: torch.device) -> Any:  # noqa: ANN401
    """One forward without a cache, multiplied as this processor does it best."""
    with widened():
        return run_as_it_is(model, batch, device)


def run_as_it_is(model: nn.Module, batch: Batch, device: torch.device) -> Any:  # noqa: ANN401
    """The same with torch's own products, for who watches its functions."""
    kwargs: dict[str, Any] = to_device(arguments_of(model, batch), device)
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs["use_cache"] = False
    with _no_cache_inside(model):
        return model(**kwargs)


@contextmanager
def _no_cache_inside(model: nn.Module) -> Iterator[None]:
    """The part that writes text has a config of its own, and a call that is repeated would read its first keys."""
    configs: list[Any] = [m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", False)]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in zip(configs, before, strict=True):
            config.use_cache = use_cache


def arguments_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What a model's forward is given of a batch: a decoder makes its inputs of labels, or else reads the encoder's."""
    given = model_inputs_of(batch)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "input_ids" in given:
        own = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & given.keys()
        return given if own else {**given, "decoder_input_ids": given["input_ids"]}
    return given


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(path, input)` whenever a submodule runs, or its weight is multiplied into an input from outside."""

    def hook(path: str) -> Callable[..., None]:
        def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(path, args[0] if args else next(iter(kwargs.values())))

        return pre

    handles = [module.get_submodule(p).register_forward_pre_hook(hook(p), with_kwargs=True) for p in paths]
    try:
        with left_products(module, paths, see):
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(
    block: nn.Module,
    run: Callable[[nn.Module, int], Any],
    batches: Sequence[Batch],
    wanted: dict[str, tuple[Stat, ...]],
    fp: tuple[nn.Module, Callable[[nn.Module, int], Any]] | None,
) -> dict[str, dict[Stat, State]]:
    """Statistics of the inputs of some submodules, over every micro-batch.

    Args:
        block: the module that is run.
        run: runs it on micro-batch i.
        batches: the micro-batches, whose tags statistics may read.
        wanted: path inside the block -> the statistics to take of its input.
        fp: the full-precision twin of the block and how to run it, for statistics that compare two streams; a token
            goes to the experts there that it goes to on the quantized path.

    Returns:
        path -> statistic -> state; paths that were never reached are missing.

    Raises:
        CalibrationError: some input holds NaN or infinite values.
    """
    states: dict[str, dict[Stat, State]] = {}
    calls = Counter[str]()  # of the first micro-batch
    for i, batch in enumerate(batches):
        # when each is called once a forward, what comes after the last of them need not be computed
        once = i > 0 and all(calls[path] == 1 for path in wanted)
        update = partial(_update, states, wanted, batch)
        if fp is None:
            seen = _watch(block, partial(run, block, i), wanted, update, once)
        else:
            ours, theirs, routes = Inputs(), Inputs(), Routes()
            with same_routes(block, routes):
                seen = _watch(block, partial(run, block, i), wanted, ours.see, once)
            with same_routes(fp[0], routes):
                _watch(fp[0], partial(fp[1], fp[0], i), wanted, theirs.see, once)
            for path, x, twin in ours.beside(theirs):
                update(path, x, twin)
        calls = calls or seen
    require_numbers(states)
    return states


def _watch(
    module: nn.Module, run: Callable[[], Any], paths: Collection[str], see: Callable[[str, Tensor], None], once: bool
) -> "Counter[str]":
    """Run the module; how often each path was seen. With `once`, stops when each was."""
    seen = Counter[str]()

    def count(path: str, x: Tensor) -> None:
        see(path, x)
        seen[path] += 1
        if once and len(seen) == len(paths):
            raise _EnoughError

    with suppress(_EnoughError), watching(module, list(paths), count):
        run()
    return seen


def _update(
    states: dict[str, dict[Stat, State]],
    wanted: dict[str, tuple[Stat, ...]],
    batch: Batch,
    path: str,
    x: Tensor,
    twin: Tensor | None = None,
) -> None:
    x_TK = flat(x)
    if not len(x_TK):
        return  # an expert without tokens
    of_path = states.setdefault(path, {s: s.start(x_TK.shape[1], x_TK.device) for s in wanted[path]})
    for stat, state in of_path.items():
        if stat.two_streams and twin is None:
            raise UnsupportedModel(
                f"{path} sees other tokens on the quantized path than in full precision (a router decides); a method "
                "that compares the two streams cannot be used for it, use gptq there"
            )
        fp_TK = twin if stat.two_streams else None
        stat.update(state, Seen(x_TK, fp_TK, token_tags(batch, stat.tags, len(x_TK))))


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401  nested arguments of any kind
    """The arguments with every tensor in them on the device; what is there already is not copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(v, device) for v in value)
    return value
