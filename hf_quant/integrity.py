"""Integrity: a flipped bit anywhere in a checkpoint is found before a weight of it is used.

A seal is one entry of the safetensors metadata, the same in every shard: the crc32 of every tensor (bytes, type and
shape), of the sorted tensor names, and of config.json. It costs 4 bytes a tensor and one read at memory speed.
"""

import base64
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_quant.errors import CheckpointError

SEAL = "hf_quant.seal"
# Rewritten by the libraries without touching the model.
VOLATILE = ("transformers_version", "_diffusers_version", "_name_or_path", "auto_map", "architectures")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: file, type (by its safetensors name), shape, and its bytes `[begin, end)` in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def seal(*namings: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata entry for tensors about to be saved; empty when some have no data here (offloaded, sharded).

    Args:
        namings: what will be saved, by name. Where the library may save under one of several namings (transformers
            renames to the original checkpoint's names unless told not to), each of them.
        config: what config.json will hold.
    """
    if any(t.is_meta or hasattr(t, "to_local") for naming in namings for t in naming.values()):
        return {}
    known: dict[int, int] = {}

    def crc(tensor: Tensor) -> int:
        if id(tensor) not in known:
            known[id(tensor)] = _tensor_crc(tensor)
        return known[id(tensor)]

    sums = [
        {"names": _names_crc(naming), "tensors": _encode([crc(naming[n]) for n in sorted(naming)])}
        for naming in namings
    ]
    unique = [s for i, s in enumerate(sums) if s not in sums[:i]]
    return {SEAL: json.dumps({"config": None if config is None else config_crc(config), "namings": unique})}


def verify(
    files: Iterable[str | Path], *, config: Mapping[str, Any] | None = None, sealed: bool = False
) -> dict[str, Stored]:
    """Check files against their seal; returns the header: what is stored under which name.

    Args:
        files: all safetensors files of the checkpoint.
        config: what config.json holds, to be checked too.
        sealed: whether a seal must be there (config.json says that there was one).

    Raises:
        CheckpointError: naming the file, and the tensor, that is not what was saved.
    """
    paths = [Path(f) for f in files]
    seals = {path: metadata.get(SEAL) for path, metadata in ((p, _metadata(p)) for p in paths)}
    header = read_header(paths)
    if not any(seals.values()):
        if sealed:
            raise CheckpointError(f"{paths[0]}: the checksums that were saved with it are gone; the file is damaged")
        return header
    for path, text in seals.items():
        if text != next(iter(seals.values())):
            raise CheckpointError(f"{path}: belongs to another checkpoint than {paths[0].name}, or is damaged")
    saved = _parse(paths[0], seals[paths[0]])
    if config is not None and saved["config"] is not None:
        verify_config(paths[0].parent / "config.json", config, saved["config"])
    names = _names_crc(header)
    wanted = next((_decode(n["tensors"]) for n in saved["namings"] if n["names"] == names), None)
    if wanted is None or len(wanted) != len(header):
        raise CheckpointError(
            f"{paths[0]}: tensors are missing, renamed or added since it was saved ({len(header)} found)"
        )
    _compare(header, dict(zip(sorted(header), wanted, strict=True)))
    return header


def verify_config(path: Path, config: Mapping[str, Any], saved: int) -> None:
    """Check what `path` holds against the crc32 it was saved with.

    Raises:
        CheckpointError: it was damaged or edited.
    """
    if config_crc(config) != saved:
        raise CheckpointError(
            f"{path}: is not the one saved with these weights; it is damaged, or was edited by hand (then load the "
            "original, change the config of the model, and save it again)"
        )


def read_header(files: Iterable[str | Path]) -> dict[str, Stored]:
    """What safetensors files hold, by name, without reading a tensor.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or two hold the same tensor.
    """
    header: dict[str, Stored] = {}
    for path in map(Path, files):
        _metadata(path)  # lets safetensors itself judge the file
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(size))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if name in header:
                raise CheckpointError(f"{path}: {name} is in {header[name].file.name} as well; the shards do not fit")
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            header[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), begin, end)
    return header


def check_index(folder: Path) -> None:
    """The index of a checkpoint in shards, when there is one: it names files that are there.

    Raises:
        CheckpointError: it is damaged, or a file that it names is missing.
    """
    for path in folder.glob("*.safetensors.index.json"):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files, sound = list(index["weight_map"].values()), isinstance(index["metadata"], dict)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); get it again") from None
        if not (sound and files and all(isinstance(f, str) for f in files)):
            raise CheckpointError(f"{path} is damaged: it does not map names to files; get it again")
        missing = sorted(f for f in set(files) if not (folder / f).is_file())
        if missing:
            raise CheckpointError(f"{path} names {missing[0]}, which is not there; get the whole folder again")


def config_crc(config: Mapping[str, Any]) -> int:
    """crc32 of a config's values, however they are laid out as text."""
    kept = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in VOLATILE}
    if isinstance(kept.get("quantization_config"), dict):
        kept["quantization_config"].pop("sealed", None)  # holds this very number
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a type: asked of safetensors itself."""
    data = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    (size,) = struct.unpack("<Q", data[:8])
    name: str = json.loads(data[8 : 8 + size])["x"]["dtype"]
    return name


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); get it again") from error


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    try:
        saved = json.loads(text or "")
        for naming in saved["namings"]:
            _decode(naming["tensors"])
            int(naming["names"])
        saved["config"]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: its checksums are damaged ({error!r})") from error
    result: dict[str, Any] = saved
    return result


def _compare(header: Mapping[str, Stored], wanted: Mapping[str, int]) -> None:
    for path in sorted({stored.file for stored in header.values()}):
        mine = {name: stored for name, stored in header.items() if stored.file == path}
        for name, found in zip(mine, _file_crcs(path, list(mine.values())), strict=True):
            if found != wanted[name]:
                raise CheckpointError(f"{path}: tensor {name} is not what was saved; the file is damaged")


def _file_crcs(path: Path, tensors: Sequence[Stored]) -> list[int]:
    """Read every tensor's bytes once, in threads: crc32 runs outside Python's lock."""
    with (
        path.open("rb") as stream,
        mmap(stream.fileno(), 0, access=ACCESS_READ) as data,
        memoryview(data) as view,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        return list(pool.map(lambda s: _crc(view[s.begin : s.end], s.dtype, s.shape), tensors))


def _crc(data: Any, dtype: str, shape: Sequence[int]) -> int:  # noqa: ANN401  any buffer
    return zlib.crc32(data, zlib.crc32(f"{dtype}{list(shape)}".encode()))


def _tensor_crc(tensor: Tensor) -> int:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))  # of stride one, whatever
    data = flat.view(torch.uint8).numpy()
    return _crc(data, dtype_name(tensor.dtype), tensor.shape)


def _names_crc(names: Iterable[str]) -> int:
    return zlib.crc32("\n".join(sorted(names)).encode())


def _encode(sums: Sequence[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(sums)}I", *sums)).decode()


def _decode(text: str) -> tuple[int, ...]:
    data = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // 4}I", data)
