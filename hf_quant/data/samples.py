"""Samples: rows of a tokenized dataset (ids, a mask, labels, ...) as batches, and a user's batches, without padding.

Padding is cut off before anything runs, not masked afterwards: so no statistic, no loss and no router ever sees it.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_quant.data.reading import Batch, to_ids, unmasked
from hf_quant.errors import CalibrationError

_log = logging.getLogger(__name__)

Ends = tuple[int, int]  # of what is kept of a row: from the first, up to the second
LABELS = ("label", "label_ids")  # as datasets call them; models say "labels"


def is_sample(item: Any) -> bool:  # noqa: ANN401  whatever a user's data holds
    """Whether an item is the inputs of one sample: token ids in one dimension, or arrays beside a single number."""
    if not isinstance(item, Mapping) or "input_ids" in item:
        return isinstance(item, Mapping) and _dims(item["input_ids"]) == 1
    if "text" in item:
        return False
    dims = [_dims(value) for value in item.values()]
    return 0 in dims and max(dims) > 0


def _dims(value: Any) -> int:  # noqa: ANN401
    """Dimensions of an array, of lists in lists, or of a number; -1: neither."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim
    if isinstance(value, list | tuple):
        inner = _dims(value[0]) if value else 0
        return inner + 1 if inner >= 0 else -1
    return 0 if isinstance(value, int | float | np.number) else -1


def as_batches(samples: Iterator[Any], takes: Collection[str], length: int, batch_size: int) -> list[Batch]:
    """Samples with equal shapes together, in the order they came, cut to `length` tokens.

    What the mask hides at either end of a sample is cut off, so that no padding is calibrated on. Columns that the
    model's forward does not take (`takes`) are dropped, like the Trainer of transformers does.

    Raises:
        CalibrationError: an item is no such sample, holds no numbers, or nothing but padding.
    """
    rows: list[Batch] = []
    for index, sample in enumerate(samples):
        (row,) = _cut(_tensors(sample, takes, index), takes, index)  # a batch of one
        rows.append({n: v[:, :length] if v.dim() == 2 else v for n, v in row.items()})
    if all(bool(row["attention_mask"].all()) for row in rows if "attention_mask" in row):
        for row in rows:
            row.pop("attention_mask", None)
    alike: dict[tuple[Any, ...], list[Batch]] = {}
    for row in rows:
        alike.setdefault(tuple((n, v.shape, v.dtype) for n, v in sorted(row.items())), []).append(row)
    return [
        {name: torch.cat([row[name] for row in rows[i : i + batch_size]]) for name in rows[0]}
        for rows in alike.values()
        for i in range(0, len(rows), batch_size)
    ]


def without_padding(batches: Sequence[Batch], takes: Collection[str]) -> list[Batch]:
    """Batches of a user, those with padding as several: rows whose padding is the same stay together.

    What a mask hides at either end of a row is cut off, of ids, sounds and whatever has its shape; a decoder's inputs
    and labels (`takes` tells that the model has one) by their own mask, or where the labels end (-100). A batch that
    cannot be taken apart (pixels that are not a row a sample) stays as it is, with a warning.

    Raises:
        CalibrationError: a mask hides all of a row.
    """
    found: list[Batch] = []
    for batch in batches:
        found += _cut(batch, takes, sum(len(next(iter(b.values()))) for b in found))
    return found


def _tensors(sample: Any, takes: Collection[str], index: int) -> Batch:  # noqa: ANN401
    if not is_sample(sample):
        raise CalibrationError(
            f"item {index} is a {type(sample).__name__}, not the inputs of one sample like the first"
        )
    found = {}
    for column, value in sample.items():
        name = "labels" if column in LABELS and "labels" not in sample else column
        if name not in takes:
            continue
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"{column} of row {index} is no array of numbers: {error}") from error
        if name == "input_ids":
            tensor = to_ids(tensor, f"row {index}")
        found[name] = (tensor.float() if tensor.dtype == torch.float64 else tensor)[None]
    if not found:
        raise CalibrationError(f"row {index} of the data holds {', '.join(sample)}, none of which the model takes")
    return found


def _cut(batch: Batch, takes: Collection[str], before: int) -> list[Batch]:
    """See `without_padding`; `before`: how many rows came before, for the error."""
    sides = _sides(batch, takes, before)
    if len({len(kept) for _, kept in sides}) != 1:
        return [batch]
    alike: dict[tuple[Ends, ...], list[int]] = {}
    for row, ends in enumerate(zip(*(kept for _, kept in sides), strict=True)):
        alike.setdefault(ends, []).append(row)
    if len(alike) > 1 and len({len(v) for v in batch.values()}) > 1:
        shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in batch.items())
        _log.warning("padding stays in a batch that cannot be taken apart (%s): pass one sample a batch", shapes)
        return [batch]
    found = []
    for several, rows in alike.items():
        part = {name: v[rows] for name, v in batch.items()} if len(alike) > 1 else dict(batch)
        for (names, _), (start, stop) in zip(sides, several, strict=True):
            part |= {name: part[name][:, start:stop].contiguous() for name in names}  # models view them
        found.append(part)
    return found


def _sides(batch: Batch, takes: Collection[str], before: int) -> list[tuple[list[str], list[Ends]]]:
    """Of what lies beside the mask, and of a decoder: names of what is cut together, and what is kept of each row."""
    own_labels = "decoder_input_ids" in takes  # they are a decoder's, and no column beside its ids
    theirs = [n for n in batch if n.startswith("decoder_") or (own_labels and n == "labels")]
    found: list[tuple[list[str], list[Ends]]] = []
    ids = batch.get("input_ids")
    mask = batch.get("attention_mask", None if ids is None else torch.ones_like(ids))
    beside = [n for n, v in batch.items() if n not in theirs and mask is not None and v.shape == mask.shape]
    if mask is not None and mask.dim() == 2 and any(n != "attention_mask" for n in beside):
        kept = [unmasked(row) for row in (mask != 0).cpu()]
        if (0, 0) in kept:
            index = before + kept.index((0, 0))
            raise CalibrationError(f"row {index} of the data has no tokens, or its attention_mask hides all of them")
        found.append((beside, kept))
    target, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if target is not None and target.dim() == 2:
        ends = [unmasked(row) for row in (target != 0).cpu()]
        found.append(([n for n in theirs if batch[n].shape == target.shape], ends))
    elif own_labels and labels is not None and labels.dim() == 2:  # a first one may be hidden, and is an input yet
        ends = [(0, unmasked(row)[1] or len(row)) for row in (labels != -100).cpu()]
        found.append(([n for n in theirs if batch[n].shape == labels.shape], ends))
    return found
