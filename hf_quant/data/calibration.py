"""Calibration data: whatever a user has (texts, a dataset, a path, token ids, batches) becomes model inputs."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_quant.data.reading import (
    Batch,
    Data,
    Item,
    Processor,
    as_batch,
    is_batch,
    open_data,
    peek,
    to_ids,
    to_rows,
    tokenize,
)
from hf_quant.data.samples import as_batches, is_sample, without_padding
from hf_quant.diffusion.denoising import Denoising
from hf_quant.errors import CalibrationError

POOL = 16  # texts are read until this many times the wanted windows are there, so an endless source ends

_log = logging.getLogger(__name__)


class Calibration:
    """A handle on the user's data while a run lasts: shared, never copied, never serialized.

    `AutoModel.from_pretrained` deep-copies its keyword arguments and the config; a copied generator fails and a
    copied dataset doubles memory, so `copy.deepcopy` returns the handle itself.

    Args:
        data: see `token_windows`; another handle is unwrapped.
        processor: tokenizer (or processor with one) for texts, when none is passed elsewhere.
    """

    def __init__(self, data: Data, processor: Processor = None) -> None:
        if isinstance(data, Calibration):
            data, processor = data.data, data.processor if processor is None else processor
        self.data: Data = data
        self.processor: Processor = processor
        self._used: str | None = None

    def __copy__(self) -> "Calibration":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calibration":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.data is None:  # a quantized model is pickled together with its config, which holds none
            return Calibration, (None, self.processor)
        raise TypeError("calibration data is never serialized; save the config without it and pass the data again")

    def __repr__(self) -> str:
        return f"Calibration({describe(self.data)})"

    def fingerprint(self) -> str:
        """sha256 over the token ids (or batches) that were last drawn from it.

        Raises:
            CalibrationError: nothing was drawn yet.
        """
        if self._used is None:
            raise CalibrationError(
                "nothing was drawn from this calibration data yet, so there is nothing to fingerprint"
            )
        return self._used


def fingerprint(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """sha256 over names, types, row shapes and values: the same for every split of the rows into batches."""
    digest = hashlib.sha256()
    for name in sorted({n for b in batches for n in b}):
        parts = [b[name].detach().cpu() for b in batches if name in b]
        digest.update(f"{name} {parts[0].dtype} {tuple(parts[0].shape[1:])}\n".encode())
        for part in parts:
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe(data: Data) -> str:
    """A few words for reports and cards: "python_docs.txt", "16 texts", "token ids [512, 256]"; never the content."""
    data = data.data if isinstance(data, Calibration) else data
    if data is None:
        return "none"
    if isinstance(data, Denoising):
        return repr(data)
    if isinstance(data, str | Path):
        return Path(data).name
    if isinstance(data, Tensor | np.ndarray):
        return f"token ids {list(data.shape)}"
    if isinstance(data, Mapping):
        return "a batch of " + ", ".join(map(str, data))
    if isinstance(data, list | tuple):
        first = data[0] if data else None
        return f"{len(data)} " + (
            "texts" if isinstance(first, str) else "batches" if is_batch(first) and not is_sample(first) else "rows"
        )
    name = getattr(getattr(data, "info", None), "dataset_name", None)
    return f"{type(data).__name__} {name}" if name else type(data).__name__


def model_inputs(
    data: Data,
    processor: Processor,
    samples: int,
    length: int,
    seed: int,
    batch_size: int,
    model: nn.Module | None = None,
) -> list[Batch]:
    """Micro-batches for a model's forward: dicts of tensors pass through, all else becomes token windows.

    Of a dataset's rows, all that the model takes is kept (ids, labels, a mask, ...), see `samples.as_batches`. Of
    dicts of tensors, padding is cut off, see `samples.without_padding`.

    Raises:
        CalibrationError: see `token_windows`.
    """
    handle = data if isinstance(data, Calibration) else None
    takes = _taken_by(model)
    rows = None if model is None else lambda items: as_batches(islice(items, samples), takes, length, batch_size)
    batches, source = _as_they_are(handle.data if handle else data, takes, rows)
    if batches is not None:
        if handle:
            handle._used = fingerprint(batches)
        return batches
    ids = token_windows(source, processor or (handle and handle.processor), samples, length, seed)
    if handle:
        handle._used = fingerprint([{"input_ids": ids}])
    return [{"input_ids": ids[i : i + batch_size]} for i in range(0, len(ids), batch_size)]


def held_out(
    data: Data, processor: Processor, window: int, tokens: int, batch_size: int = 4, model: nn.Module | None = None
) -> list[Batch]:
    """What to measure on: dicts of tensors pass through, without padding, else windows spread over the data.

    Raises:
        CalibrationError: see `spread_windows`.
    """
    handle = data if isinstance(data, Calibration) else None
    batches, source = _as_they_are(handle.data if handle else data, _taken_by(model))
    if batches is not None:
        return batches
    ids = spread_windows(source, processor or (handle and handle.processor), window, tokens)
    return [{"input_ids": part} for part in ids.split(batch_size)]


def _taken_by(model: nn.Module | None) -> Collection[str]:
    """Names of what a model's forward takes."""
    return () if model is None else signature(model.forward).parameters


def _as_they_are(
    data: Data, takes: Collection[str], rows: Callable[[Iterator[Item]], list[Batch]] | None = None
) -> tuple[list[Batch] | None, Tensor | Iterator[Item]]:
    """Dicts of tensors when the data is that, or what `rows` makes of samples, and whatever it is otherwise."""
    source = open_data(data)
    if isinstance(source, Tensor):
        return None, source
    head = list(islice(source, 1))
    source = chain(head, source)
    if rows is not None and head and is_sample(head[0]):
        return rows(source), source
    first, source = peek(source)
    if not is_batch(first):
        return None, source
    return without_padding([as_batch(b, i) for i, b in enumerate(source)], takes), source


def token_windows(data: Data, processor: Processor, samples: int, length: int, seed: int) -> Tensor:
    """Token ids int64 `[n, S]`, `n <= samples`, `S <= length`, the same for the same data and seed.

    Rows of ids are taken as they are: the first `samples`, cut to `length`. A flat stream of ids, and texts
    (tokenized, joined by the end-of-text token), are cut into windows of `length`, of which `samples` are drawn with
    the seed; texts are read until `16 * samples` windows are there, so a huge or endless source is fine.

    Args:
        data: texts (list, iterable, or a function that returns one), a datasets.Dataset with a column "text" or
            "input_ids", a path (.txt, .jsonl, .npy, .parquet, a folder), token ids (torch, numpy or lists), or a
            `Calibration` around any of these.
        processor: the model's tokenizer, or a processor that has one; only texts need it.
        samples: how many windows.
        length: tokens in a window.
        seed: of the draw.

    Raises:
        CalibrationError: no data, empty, too short, no tokenizer for texts, not integers, a missing path, or a
            dataset without a usable column.
    """
    if samples < 1 or length < 2:
        raise CalibrationError(f"samples={samples}, length={length}: at least 1 window of at least 2 tokens is needed")
    if isinstance(data, Calibration):
        ids = token_windows(data.data, processor or data.processor, samples, length, seed)
        data._used = fingerprint([{"input_ids": ids}])
        return ids
    ids = _token_ids(data, processor, samples, length, samples * POOL * length)
    return _draw(ids, samples, length, seed) if ids.dim() == 1 else ids


def spread_windows(data: Data, processor: Processor, window: int, tokens: int) -> Tensor:
    """`tokens // window` windows of `window` tokens, evenly spread over the data: what an evaluation runs over.

    The data, the same as in `token_windows`, is cut into windows one after the other (rows of ids are cut to `window`),
    of which number `i (there - 1) // (wanted - 1)` is taken for every `i < wanted`: a stream of documents in order is
    seen from its beginning to its end. Fewer windows come back when the data has no more. Texts are read until 16 times
    the wanted windows are there.

    Raises:
        CalibrationError: as `token_windows`; too short means less than one window.
    """
    wanted = tokens // window if window >= 2 else 0
    if wanted < 1:
        raise CalibrationError(f"window={window}, tokens={tokens}: at least one window of at least 2 tokens is needed")
    if isinstance(data, Calibration):
        data, processor = data.data, processor or data.processor
    ids = _token_ids(data, processor, POOL * wanted, window, POOL * wanted * window)
    if ids.dim() == 1:
        there = len(ids) // window
        if there == 0:
            raise CalibrationError(
                f"the data is too short: {len(ids)} tokens make no window of {window}; pass more text"
            )
        ids = ids[: there * window].reshape(there, window)
    there = len(ids)
    if there <= wanted:
        return ids
    return ids[[i * (there - 1) // max(1, wanted - 1) for i in range(wanted)]]


def _token_ids(data: Data, processor: Processor, rows: int, length: int, enough: int) -> Tensor:
    """Rows of ids `[n <= rows, S <= length]`, or a flat stream, of at most `enough` tokens when it comes from texts."""
    source = open_data(data)
    if not isinstance(source, Tensor):
        first, source = peek(source)
        if isinstance(first, str):
            source = tokenize(source, processor, enough)
        elif is_batch(first):
            raise CalibrationError(
                f"the data holds batches with {sorted(first)}; token windows need texts or token ids"
            )
        elif isinstance(first, int | np.integer):
            source = to_ids(list(source), "token ids")
        else:
            source = to_rows(islice(source, rows), length)
    if source.dim() == 1:
        return source
    if source.dim() != 2 or source.numel() == 0 or source.shape[1] < 2:
        raise CalibrationError(
            f"token ids of shape {list(source.shape)}: [n, S] with S >= 2, or a flat stream, is needed"
        )
    return source[:rows, :length].contiguous()


def check_inputs(batches: Iterable[Mapping[str, Tensor]], model: nn.Module) -> None:
    """The data is what this model takes, and token ids have a row in its input embedding.

    Raises:
        CalibrationError: tokens for a model of images or sounds, or an id that lies outside, so the ids come from
            another model's tokenizer.
    """
    main = getattr(model, "main_input_name", None)  # of transformers' models
    takes = signature(model.forward).parameters
    for batch in batches:
        if isinstance(main, str) and main in takes and "input_ids" in batch and "input_ids" not in takes:
            raise CalibrationError(
                f"{type(model).__name__} takes {main} and the data gives {', '.join(sorted(batch))}: pass batches "
                f"[{{{main!r}: tensor}}, ...], or a .safetensors file with a tensor of that name"
            )
    try:
        rows: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no transformers model, or one with several vocabularies
        return
    if rows is None:
        return
    for batch in batches:
        ids = batch.get("input_ids")
        if ids is not None and ids.numel() and int(ids.max()) >= rows:
            raise CalibrationError(
                f"token id {int(ids.max())} is outside the model's vocabulary of {rows}: the data was tokenized with "
                "another model's tokenizer; pass texts, or ids made by this model's tokenizer"
            )


def context_length(model: nn.Module) -> int | None:
    """Tokens in the longest window the model takes, when its config says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 1 else None


def _draw(stream: Tensor, samples: int, length: int, seed: int) -> Tensor:
    there = len(stream) // length
    if there == 0 or there * 4 < samples:
        raise CalibrationError(
            f"the calibration data is too short: {len(stream)} tokens make {there} windows of {length}, and "
            f"{samples} are wanted; pass more text, or token ids [n, S] to calibrate on exactly these rows"
        )
    if there < samples:
        _log.warning(
            "calibrating on %d windows of %d tokens: the data has no more (%d were wanted)", there, length, samples
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:samples]
    return stream[: there * length].reshape(there, length)[order].contiguous()
