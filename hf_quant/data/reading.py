"""Opening calibration data of every kind: files, datasets, texts, token ids. `calibration` makes windows of it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_quant.errors import CalibrationError

Batch = dict[str, Tensor]
Data = Any  # what a user may pass, see `calibration.token_windows`
Processor = Any  # a tokenizer or a processor that has one: called with a text, gives a mapping with "input_ids"
Item = Any  # what iterating over the data gives

KINDS = (
    "a list of texts, a datasets.Dataset, a path (.txt, .jsonl, .npy, .parquet, a folder; .safetensors with a model's "
    "inputs by name), token ids [n, S] or batches of tensors"
)
BY_NAME = ' (images and sounds as the processor gives them, batches by name: [{"pixel_values": tensor}, ...])'
ROWS = 8  # of a file of tensors that make a batch


def open_data(data: Data) -> Tensor | Iterator[Item]:
    """The data as a tensor of ids, or as an iterator of items (texts, rows of ids, rows of a dataset, batches).

    Raises:
        CalibrationError: none, of an unknown kind, a missing or unreadable path.
    """
    if data is None:
        raise CalibrationError(f"this needs calibration data and got none: pass {KINDS}")
    if isinstance(data, str | Path):
        return _open_path(data)
    if isinstance(data, Tensor | np.ndarray):
        return to_ids(data, "token ids")
    if isinstance(data, Mapping):
        if is_batch(data):
            return iter([data])
        raise CalibrationError(
            f"a mapping with {sorted(map(str, data))}: pick one split of the dataset, or pass {KINDS}"
        )
    if isinstance(data, Iterable):
        return iter(data)
    if callable(data):
        return open_data(data())
    raise CalibrationError(f"calibration data of type {type(data).__name__}: pass {KINDS}")


def _open_path(given: str | Path) -> Tensor | Iterator[Item]:
    path = Path(given)
    try:
        found = path.exists()
    except (OSError, ValueError):  # a whole text passed as a path: too long, or with a NUL
        found = False
    if not found:
        shown = str(given) if len(str(given)) < 200 else str(given)[:60] + "..."
        raise CalibrationError(f"no such calibration file or folder: {shown!r} (a single text goes in a list: [text])")
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return iter(_dataset(path))
        if suffix == ".npy":
            return to_ids(np.load(path, allow_pickle=False), str(path))
        if suffix == ".safetensors":
            return _rows_of(load_file(path), path)
        if suffix == ".jsonl":
            return iter([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])
        if suffix in (".parquet", ".csv", ".arrow"):
            return iter(_dataset(path))
        return iter([path.read_text(encoding="utf-8")])
    except CalibrationError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise CalibrationError(f"cannot read calibration data from {path}: {error}") from error


def _rows_of(tensors: Batch, path: Path) -> Iterator[Batch]:
    """Tensors by the names of a model's inputs, a row a sample, as batches."""
    counts = {len(t) if t.dim() else 0 for t in tensors.values()}
    if len(counts) != 1 or 0 in counts:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(tensors.items())) or "nothing"
        raise CalibrationError(f"{path} holds {shapes}: a model's inputs by name are needed, a row a sample in each")
    parts = {name: tensor.split(ROWS) for name, tensor in tensors.items()}
    return iter([dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)])


def _dataset(path: Path) -> Iterable[Any]:
    """A file or folder through `datasets`, streamed: nothing is cached or downloaded."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"reading {path} needs the package datasets: pip install datasets") from error
    if path.is_dir() and (path / "state.json").exists():
        saved: Iterable[Any] = datasets.load_from_disk(str(path))
        return saved
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in (".parquet", ".txt", ".jsonl", ".csv", ".arrow")
        )
        if not files:
            raise CalibrationError(f"the folder {path} holds no .txt, .jsonl, .parquet, .csv or .arrow file")
        return chain.from_iterable(_open_path(p) for p in files)
    kind = path.suffix[1:].lower()
    stream: Iterable[Any] = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return stream


def peek(items: Iterator[Item]) -> tuple[Item, Iterator[Item]]:
    """The first item (a dataset's row reduced to its ids or text), and all of them."""
    for first in items:
        head = _field(first)
        return head, chain([head], map(_field, items))
    raise CalibrationError("the calibration data is empty (an iterator that was already used up is empty too)")


def _field(item: Item) -> Item:
    if not isinstance(item, Mapping) or is_batch(item):
        return item
    if "input_ids" in item and "attention_mask" in item:
        return item["input_ids"][slice(*unmasked(item["attention_mask"]))]
    for column in ("input_ids", "text"):
        if column in item:
            return item[column]
    raise CalibrationError(
        f"the dataset has no column 'text' or 'input_ids', only {sorted(map(str, item))}; rename one"
    )


def unmasked(mask: Any) -> tuple[int, int]:  # noqa: ANN401  an array or a list
    """Where that begins and ends which lies between the padding at either end of a row; (0, 0): nothing does."""
    there = np.flatnonzero(np.asarray(mask))
    return (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)


def is_batch(item: Item) -> bool:
    """Whether an item is a dict of tensors, which a model takes as it is."""
    return isinstance(item, Mapping) and bool(item) and all(isinstance(v, Tensor) and v.dim() for v in item.values())


def as_batch(item: Item, index: int) -> Batch:
    """The item as a dict of tensors; anything else is a `CalibrationError`."""
    if not is_batch(item):
        raise CalibrationError(f"batch {index} is a {type(item).__name__}, not a dict of tensors like those before it")
    return dict(item)


def tokenize(texts: Iterator[Item], processor: Processor, enough: int) -> Tensor:
    """Ids of the texts `[T <= enough]`, joined by the end-of-text token; reading stops when there are enough."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer):
        raise CalibrationError(
            "texts need the model's tokenizer: pass processor=tokenizer beside them, or token ids"
            + ("" if tokenizer is None else f" (a tokenizer, not its name: this is {tokenizer!r})")
        )
    eos = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(f"item {index} is a {type(text).__name__}, not a text like those before it")
        if stream and eos is not None:
            stream.append(eos)
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= enough:
            break
    return torch.tensor(stream[:enough], dtype=torch.int64)


def to_ids(values: Data, where: str) -> Tensor:
    """Integers of any width and container as int64; `where` names them in a `CalibrationError`."""
    try:
        ids = torch.as_tensor(values.astype(np.int64) if getattr(values, "dtype", None) == np.uint16 else values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{where} are not an array of integers: {error}{BY_NAME}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise CalibrationError(f"{where} are {ids.dtype}; token ids are integers{BY_NAME}")
    ids = ids.to(torch.int64)
    if ids.numel() and int(ids.min()) < 0:
        raise CalibrationError(f"{where} hold the negative id {int(ids.min())}; labels or padding were passed as ids")
    return ids


def to_rows(rows: Iterator[Item], length: int) -> Tensor:
    """Rows of ids `[n, S <= length]`; unequal ones are a `CalibrationError`."""
    parts = [to_ids(row, f"row {i}") for i, row in enumerate(rows)]
    if any(p.dim() == 0 or p.numel() == 0 for p in parts):
        raise CalibrationError(f"the calibration data holds rows that are empty or no sequence; pass {KINDS}")
    tensors = [p.reshape(-1, p.shape[-1])[:, :length] for p in parts]
    sizes = sorted({t.shape[1] for t in tensors})
    if len(sizes) > 1:
        raise CalibrationError(
            f"rows of token ids are {sizes[0]} to {sizes[-1]} tokens long and {length} are wanted: pass rows of "
            "one length, texts, or batches with an attention_mask"
        )
    return torch.cat(tensors)
