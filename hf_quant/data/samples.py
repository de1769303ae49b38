"""Samples: rows of a tokenized dataset (ids, a mask, labels, ...) as batches of a model's inputs, without padding."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_quant.data.reading import Batch, to_ids, unmasked
from hf_quant.errors import CalibrationError

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
    rows = [_unpadded(_tensors(s, takes, i), "decoder_input_ids" in takes, length, i) for i, s in enumerate(samples)]
    if all(bool(row["attention_mask"].all()) for row in rows if "attention_mask" in row):
        for row in rows:
            row.pop("attention_mask", None)
    alike: dict[tuple[Any, ...], list[Batch]] = {}
    for row in rows:
        alike.setdefault(tuple((n, v.shape, v.dtype) for n, v in sorted(row.items())), []).append(row)
    return [
        {name: torch.stack([row[name] for row in rows[i : i + batch_size]]) for name in rows[0]}
        for rows in alike.values()
        for i in range(0, len(rows), batch_size)
    ]


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
        found[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not found:
        raise CalibrationError(f"row {index} of the data holds {', '.join(sample)}, none of which the model takes")
    return found


def _unpadded(row: Batch, own_labels: bool, length: int, index: int) -> Batch:
    """`own_labels`: they are a decoder's, and no column beside the ids."""
    if "input_ids" not in row:
        return row
    size = len(row["input_ids"])
    beside = {n for n, v in row.items() if v.dim() == 1 and len(v) == size and not n.startswith("decoder_")}
    kept = unmasked(row["attention_mask"]) if "attention_mask" in beside else slice(None)
    cut = {n: v[kept] if n in beside and not (own_labels and n == "labels") else v for n, v in row.items()}
    if not len(cut["input_ids"]):
        raise CalibrationError(f"row {index} of the data has no tokens, or its attention_mask hides all of them")
    return {n: v[:length] if v.dim() == 1 else v for n, v in cut.items()}
