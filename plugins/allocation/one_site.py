"""One-site sensitivities: round the sites of one slot, leave all others, and see how far the model moves.

    OneSiteKl   mean over tokens of KL(p(full precision) || p(one slot rounded))
    OneSiteMse  ||z(one slot rounded) - z||^2 / ||z||^2 of the model's output z

The loss that a finished model will have is taken to be the sum over its slots, which holds while the errors are small.
Blocks before the slot's own are not computed again. Outputs are those of whole micro-batches, the first that hold
`rows` samples.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_quant.capture import first_tensor, run_model
from hf_quant.errors import UnsupportedModel
from hf_quant.running.memo import Memo
from hf_quant.sites import find_blocks
from hf_quant.stages.allocator import Rounded, Slot, standing_in
from hf_quant.stages.sampler import Batch


@dataclass(frozen=True, slots=True)
class OneSiteKl:
    """KL of the logits, in nats a token (or an image)."""

    rows: int = 16

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        return kl_of(model, _every(slots, rounded), some(batches, self.rows))


@dataclass(frozen=True, slots=True)
class OneSiteMse:
    """Relative squared error of the model's first output, whatever it is."""

    rows: int = 16

    def losses(
        self, model: nn.Module, slots: Sequence[Slot], rounded: Rounded, batches: Sequence[Batch], seed: int
    ) -> list[tuple[float, ...]]:
        """See `Sensitivity.losses`."""
        return _moved(model, _every(slots, rounded), some(batches, self.rows), _outputs, _relative)


def some(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first micro-batches that hold `rows` samples together, the last cut short; or all of them."""
    taken: list[Batch] = []
    for batch in batches:
        if rows <= 0:
            break
        taken.append(cut(batch, slice(rows)))
        rows -= samples(batch)
    return taken


def samples(batch: Batch) -> int:
    """How many samples a micro-batch holds."""
    return next((len(value) for value in batch.values() if value.dim()), 1)


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of its samples; what is said of the whole micro-batch stays."""
    return {name: value[rows] if value.dim() else value for name, value in batch.items()}


Read = Callable[[nn.Module, Batch], Tensor]  # the model's output on a micro-batch, `[tokens, ...]`
Far = Callable[[Tensor, Tensor], Tensor]  # (full precision, rounded) -> how far apart, summed over the tokens


Disturbed = Sequence[Sequence[Mapping[str, Tensor]]]  # [slot][choice]: site -> other weights `W_NK`


def kl_of(model: nn.Module, disturbed: Disturbed, batches: Sequence[Batch]) -> list[tuple[float, ...]]:
    """KL in nats a token of the model with other weights, for every slot and choice; the slots are of one block."""
    return _moved(model, disturbed, batches, _log_probabilities, _kl)


def _every(slots: Sequence[Slot], rounded: Rounded) -> Disturbed:
    return [[{n: rounded(n, spec) for n in slot.sites} for spec in slot.choices] for slot in slots]


@torch.no_grad()
def _moved(
    model: nn.Module, disturbed: Disturbed, batches: Sequence[Batch], read: Read, far: Far
) -> list[tuple[float, ...]]:
    sums = [[0.0] * len(row) for row in disturbed]
    tokens = 0
    for batch in batches:
        prefix = _prefix(model, next(iter(disturbed[0][0])))
        with prefix():
            expected = read(model, batch)
        tokens += len(expected)
        for i, row in enumerate(disturbed):
            for c, others in enumerate(row):
                with standing_in(model, others), prefix():
                    sums[i][c] += float(far(expected, read(model, batch)))
    return [tuple(s / tokens for s in row) for row in sums]


def _prefix(model: nn.Module, site: str) -> Callable[[], AbstractContextManager[None]]:
    """Inside, the blocks before the site's own compute once, on one micro-batch, and then answer from memory."""
    block = next((b for b in find_blocks(model) if site.startswith(b + ".")), None)
    if block is None:
        return nullcontext
    parent, _, number = block.rpartition(".")
    memo = Memo(model.get_submodule(parent))
    memo.finish([f"{earlier}.all" for earlier in range(int(number))], [])
    return partial(memo.during, 0)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """`[tokens, V]` of the tokens that are no padding.

    Raises:
        UnsupportedModel: the model has no logits.
    """
    found = getattr(run_model(model, batch, next(p.device for p in model.parameters())), "logits", None)
    if not isinstance(found, Tensor):
        raise UnsupportedModel(
            f"{type(model).__name__} gives no logits, so what rounding does has no KL and a budget cannot "
            "be spent; give bits instead"
        )
    mask = batch.get("attention_mask")
    flat = found.flatten(0, -2)
    if mask is not None and mask.shape == found.shape[:-1]:
        flat = flat[mask.flatten().bool().to(flat.device)]
    return flat.float()


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    return logits(model, batch).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    out = run_model(model, batch, next(p.device for p in model.parameters()))
    found = getattr(out, "logits", None)
    return (found if isinstance(found, Tensor) else first_tensor(out)).flatten(0, -2).float()


def _relative(z: Tensor, other: Tensor) -> Tensor:
    return (z - other).square().sum() / z.square().mean(0).sum().clamp_min(1e-30)
