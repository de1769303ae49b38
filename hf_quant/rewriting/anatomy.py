"""Anatomy: who writes to a model's residual stream and who reads it, and what else can be rotated.

Read off one forward on a few tokens: a *reader* is a group of layers whose input a norm of the stream's width made; a
*writer* is any other layer of a block with outputs of that width, and whatever fills the stream before the first
block. That the list is right and complete is not assumed: the rotation is rehearsed with hooks, before a weight is
touched, and the model must compute what it did.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_quant.capture import Call, Recording, first_tensor, record, run_model
from hf_quant.errors import UnsupportedModel
from hf_quant.groups import find_groups, trace_of
from hf_quant.rewriting.pairs import link
from hf_quant.sites import Site, SiteGroup, linear_shape, walk
from hf_quant.stages.sampler import Batch, made_up
from hf_quant.stages.transform import Anatomy

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
TOKENS = 32  # of the probe


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """The parts of a model by what they do to its residual stream (paths of modules).

    Attributes:
        width: of the stream.
        centered: its norms subtract the mean.
        norms: norm -> the layers that read it.
        tables: embeddings whose rows go into the stream.
        writers: layers whose outputs go into it.
        values: groups that read the values of attention heads, with their producer.
        inner: the groups that do not read the stream, those of `values` among them.
    """

    width: int
    centered: bool
    norms: Mapping[str, tuple[str, ...]]
    tables: tuple[str, ...]
    writers: tuple[str, ...]
    values: tuple[SiteGroup, ...]
    inner: tuple[SiteGroup, ...]

    def anatomy(self) -> Anatomy:
        """As a transform sees it."""
        return Anatomy(
            width=self.width,
            centered=self.centered,
            heads={g.sites[0].name: (_carried(g) // g.head, g.head) for g in self.values},
            inner={g.sites[0].name: g.sites[0].shape[1] for g in self.inner},
        )


def _carried(group: SiteGroup) -> int:
    """Output channels of the group's producer."""
    return group.sites[0].shape[1] if group.channels is None else int(group.channels.max()) + 1


def probe_of(model: nn.Module, batches: Sequence[Batch]) -> Batch:
    """A few tokens to try the model on: of the calibration data, else made up.

    Raises:
        UnsupportedModel: there is no data, and what the model takes is not known here.
    """
    if batches:
        batch = {name: tensor[:1] for name, tensor in batches[0].items()}
        ids = batch.get("input_ids")
        text = ids is not None and all(t.dim() == 2 and t.shape == ids.shape for t in batch.values())
        return {name: tensor[:, :TOKENS] for name, tensor in batch.items()} if text else batch
    return made_up(model, 1, TOKENS, 0)


@torch.no_grad()
def examine(model: nn.Module, blocks: Sequence[str], probe: Batch) -> Body:
    """Find the parts.

    Raises:
        UnsupportedModel: there is no single stream, or no norm whose output layers read directly (adaptive norms).
    """
    device = next(model.parameters()).device
    recording = record(model, blocks, [probe], device)
    if len(recording.chains) != 1:
        raise _refusal(model, f"its blocks form {len(recording.chains)} streams, and one is needed")
    width = recording.starts[0][recording.chains[0][0]].shape[-1]
    linears = [s for s in walk(model) if s.kind != "embedding"]
    groups = _inside(model, recording, linears, device) + _outside(model, linears, probe, device)
    norms = {
        g.producer: tuple(s.name for s in g.sites)
        for g in groups
        if g.producer is not None and linear_shape(model.get_submodule(g.producer)) is None
    }
    norms = {n: readers for n, readers in norms.items() if model.get_submodule(readers[0]).weight is not None}
    reading = {r for readers in norms.values() for r in readers}
    if not norms or any(linear_of(model, r)[1] != width for r in reading):
        raise _refusal(model, "no norm of its residual stream is read by linear layers directly (is it adaptive?)")
    writers = [s.name for s in linears if s.block and s.name not in reading and s.shape[0] == width]
    tables, before = _before(model, recording.chains[0][0], probe, device, width)
    inner = tuple(g for g in groups if g.sites[0].block and g.sites[0].name not in reading)
    return Body(
        width=width,
        centered=any(_centers(model.get_submodule(n), width) for n in norms),
        norms=norms,
        tables=tuple(tables),
        writers=(*before, *writers),
        values=tuple(g for g in inner if g.producer is not None and g.head > 1),
        inner=inner,
    )


def linear_of(model: nn.Module, name: str) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    found = linear_shape(model.get_submodule(name))
    assert found is not None  # noqa: S101  `walk` has found it
    return found[1]


def _inside(model: nn.Module, recording: Recording, sites: Sequence[Site], device: torch.device) -> list[SiteGroup]:
    """The groups of every block, with their producers."""
    found: list[SiteGroup] = []
    chain = recording.chains[0]
    hidden = recording.starts[0][chain[0]]
    for name in chain:
        block, call = model.get_submodule(name), recording.calls[0][name]

        def run(b: nn.Module, call: Call = call, h: Tensor = hidden) -> Tensor:
            return call.run(b, h, device)

        found += link(find_groups(block, name, [s for s in sites if s.block == name], run), block, name, run)
        hidden = run(block)
    return found


def _outside(model: nn.Module, sites: Sequence[Site], probe: Batch, device: torch.device) -> list[SiteGroup]:
    """The groups outside all blocks (the head, and the last norm)."""
    return find_groups(model, "", [s for s in sites if not s.block], lambda m: run_model(m, probe, device))


def _before(
    model: nn.Module, first: str, probe: Batch, device: torch.device, width: int
) -> tuple[list[str], list[str]]:
    """Embeddings, and linear layers, of the stream's width that run before the first block."""
    names = list(dict.fromkeys(n for n, _ in trace_of(model, "", lambda m: run_model(m, probe, device)).inputs))
    start = next((i for i, n in enumerate(names) if n.startswith(first + ".")), len(names))
    modules = {n: model.get_submodule(n) for n in names[:start]}
    tables = [n for n, m in modules.items() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    return tables, [n for n, m in modules.items() if (found := linear_shape(m)) and found[1][0] == width]


def _centers(norm: nn.Module, width: int) -> bool:
    """Whether a norm subtracts the mean: adding a constant then changes nothing."""
    weight = next(norm.parameters(), torch.empty(0))
    x = torch.linspace(-1, 1, width, device=weight.device, dtype=weight.dtype)[None] ** 3
    return bool(torch.allclose(norm(x), norm(x + 1), atol=1e-2, rtol=1e-2))


def _refusal(model: nn.Module, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the residual stream of {type(model).__name__} cannot be rotated: {reason}. Use a method without rotations, "
        "such as smoothquant or gptq"
    )


@torch.no_grad()
def rehearse(model: nn.Module, body: Body, R_DD: Tensor, probe: Batch) -> None:
    """Rotate the stream with hooks: writers' outputs forth, readers' inputs back. No weight is touched.

    Raises:
        UnsupportedModel: the model then computes something else.
    """
    device = next(model.parameters()).device
    before = first_tensor(_output(model, probe, device)).double()
    R = R_DD.to(device)

    def forth(_: nn.Module, args: object, y: Tensor) -> Tensor:
        y64 = y.double()
        return ((y64 - y64.mean(-1, keepdim=True) if body.centered else y64) @ R).to(y.dtype)

    with ExitStack() as stack:
        for name in (*body.tables, *body.writers):
            stack.callback(model.get_submodule(name).register_forward_hook(forth).remove)
        for name in body.norms:
            norm = model.get_submodule(name)
            back = _bare(norm, R)
            stack.callback(norm.register_forward_hook(back).remove)
        after = first_tensor(_output(model, probe, device)).double()
    drift = float((after - before).norm() / before.norm().clamp_min(1e-12))
    if not drift <= TOLERANCE[next(model.parameters()).dtype]:
        raise _refusal(
            model,
            f"something reads or writes it that is no linear layer beside a norm (post-norms, routers, learned "
            f"tokens); rotating what was found changes its output by {drift:.1e}",
        )


def _bare(norm: nn.Module, R: Tensor):  # type: ignore[no-untyped-def]
    """The norm's output as its readers knew it: the gain applied to what was rotated back."""
    from hf_quant.rewriting.rewrite import norm_offset

    weight, beta = norm.weight, getattr(norm, "bias", None)
    gain = weight.double() + norm_offset(norm) if isinstance(weight, Tensor) else torch.ones(len(R))
    b = beta.double() if isinstance(beta, Tensor) else torch.zeros_like(gain)

    def hook(_: nn.Module, args: object, y: Tensor) -> Tensor:
        safe = torch.where(gain == 0, torch.ones_like(gain), gain)
        return (((y.double() - b) / safe) @ R.T * gain + b).to(y.dtype)

    return hook


def _output(model: nn.Module, probe: Batch, device: torch.device):  # type: ignore[no-untyped-def]
    out = run_model(model, probe, device)
    return next(iter(out.values())) if isinstance(out, dict) else out
