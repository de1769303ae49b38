"""Random damage to a saved model, and what loading it then does. A program of its own, so that a crash is seen as one.

`python -m integration_tests.loader_fuzz FOLDER FIRST LAST` damages FOLDER's checkpoint in LAST - FIRST ways and prints
a line of JSON for each: the damage, and "identical", "refused" with the error, or "WRONG" with the reason.
"""

import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import hf_quant
from hf_quant.errors import HfQuantError
from hf_quant.loading import load_model

SECONDS = 20.0  # a load takes 0.05; this is a hang
READ = ("config.json", "model.safetensors.index.json")  # of the files beside the weights
Damage = Callable[[random.Random, Path], str]


# ---- the damage ------------------------------------------------------------------------------------------------------


def _weights(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in READ))


def flip_bits(rng: random.Random, folder: Path) -> str:
    file = _file(rng, folder)
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
    end = rng.choice((len(data), min(header, len(data))))
    where = [rng.randrange(end) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for i in where:
        data[i] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"bits flipped in {file.name} at {where}"


def truncate(rng: random.Random, folder: Path) -> str:
    file = _file(rng, folder)
    data = file.read_bytes()
    keep = rng.choice((0, 1, 7, 8, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))))
    file.write_bytes(data[:keep])
    return f"{file.name} cut to {keep} of {len(data)} bytes"


def splice(rng: random.Random, folder: Path) -> str:
    """Bytes lost, doubled, or put in between."""
    file = _file(rng, folder)
    data = file.read_bytes()
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 16, 64))
    cut = data[at : at + length]
    put = rng.choice((b"", cut + cut, rng.randbytes(length) + cut, str(rng.randrange(1000)).encode()))
    file.write_bytes(data[:at] + put + data[at + length :])
    return f"{cut.hex()} of {file.name} at {at} became {put.hex()}"


def append(rng: random.Random, folder: Path) -> str:
    file = _file(rng, folder)
    extra = rng.randbytes(rng.choice((1, 8, 64)))
    file.write_bytes(file.read_bytes() + extra)
    return f"{len(extra)} bytes appended to {file.name}"


def overwrite(rng: random.Random, folder: Path) -> str:
    file = _weights(rng, folder)
    data = bytearray(file.read_bytes())
    size = rng.choice((1, 4, 16, 256))
    begin = rng.randrange(len(data))
    fill = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    data[begin : begin + size] = fill[: len(data) - begin]
    file.write_bytes(data)
    return f"{size} bytes of {file.name} overwritten at {begin} with {fill[:4].hex()}..."


def edit_header(rng: random.Random, folder: Path) -> str:
    """Another, still readable, header over the same bytes."""
    file = _weights(rng, folder)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = sorted(n for n in header if n != "__metadata__")
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(("dtype", "shape", "transpose", "swap", "rename", "delete", "copy", "metadata", "entry"))
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(("U8", "I8", "F16", "BF16", "F32", "F64", "I32", "BOOL", "X9"))
    elif kind == "shape":
        header[name]["shape"] = rng.choice(([], [1], [0], header[name]["shape"] + [1], [-1], [2**40, 2**40]))
    elif kind == "transpose":
        header[name]["shape"] = header[name]["shape"][::-1]
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "rename":
        header[name + rng.choice(("x", "_", ".weight"))] = header.pop(name)
    elif kind == "delete":
        del header[name]
    elif kind == "copy":
        header[name + "_2"] = header[name]
    elif kind == "metadata":
        _damage_json(rng, header["__metadata__"])
    else:
        _damage_json(rng, header[name])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header of {file.name}: {kind} {name} {other}"


def move_shards(rng: random.Random, folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    one, two = rng.sample(files, 2)
    kind = rng.choice(("swap", "copy", "delete", "index"))
    if kind == "swap":
        first = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(first)
    elif kind == "copy":
        two.write_bytes(one.read_bytes())
    elif kind == "delete":
        one.unlink()
    else:
        (folder / "model.safetensors.index.json").unlink()
    return f"shards: {kind} {one.name} {two.name}"


def swap_tensors(rng: random.Random, folder: Path) -> str:
    """Bytes of two tensors of one kind exchanged: only a checksum can tell."""
    file = _weights(rng, folder)
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    name = rng.choice(sorted(header))
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    alike = [n for n in sorted(header) if header[n]["data_offsets"][1] - header[n]["data_offsets"][0] == size]
    other = rng.choice([n for n in alike if n != name] or sorted(header)[:1])
    (a, b), (c, d) = ([8 + length + x for x in header[n]["data_offsets"]] for n in (name, other))
    data[a:b], data[c:d] = data[c:d], data[a:b]
    file.write_bytes(data)
    return f"bytes of {name} and {other} exchanged"


def from_another_model(rng: random.Random, folder: Path) -> str:
    """A file of a sibling: same architecture, same method, other weights or other arguments."""
    sibling = folder.parent / "sibling"
    name = _file(rng, sibling).name
    shutil.copyfile(sibling / name, folder / name)
    return f"{name} of another model"


def edit_json(rng: random.Random, folder: Path) -> str:
    file = rng.choice((folder / "config.json",) * 5 + (folder / "model.safetensors.index.json",))
    data = json.loads(file.read_text())
    told = _damage_json(rng, data)
    file.write_text(json.dumps(data))
    return f"{file.name}: {told}"


def _damage_json(rng: random.Random, data: Any) -> str:
    """Delete, replace or add one value somewhere inside."""
    where: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        for key in keys:
            where.append((node, key))
            walk(node[key])

    walk(data)
    if not where:
        return "nothing to damage"
    node, key = rng.choice(where)
    old = node[key]
    kind = rng.choice(("delete", "replace", "replace", "tweak", "tweak", "add", "exchange"))
    if kind == "delete":
        del node[key]
        return f"{key} deleted"
    if kind == "add" and isinstance(node, dict):
        node[rng.choice(("x", "bits", "load_in_4bit", "modules", "quant_method"))] = rng.choice((1, "x", [], {}))
        return f"something added beside {key}"
    if kind == "exchange":
        other, third = rng.choice(where)
        node[key], other[third] = deepcopy(other[third]), deepcopy(node[key])
        return f"{key} and {third} exchanged"
    if kind == "tweak" and isinstance(old, bool):
        node[key] = not old
    elif kind == "tweak" and isinstance(old, int | float):
        node[key] = rng.choice((old + 1, old - 1, old * 2, -old, 0, old * 10**6, old / 3))
    elif kind == "tweak" and isinstance(old, str) and old:
        i = rng.randrange(len(old))
        node[key] = old[:i] + rng.choice(("", "x", "9", old[i] * 2)) + old[i + 1 :]
    else:
        node[key] = rng.choice(
            (None, True, -1, 0, 1e9, "", "x", "hf_quant", [], {}, [1], {"a": 1}, "int-group/1", 2**63)
        )
    return f"{key}: {str(old)[:40]!r} -> {str(node[key])[:40]!r}"


DAMAGES: tuple[Damage, ...] = (
    flip_bits,
    flip_bits,
    truncate,
    splice,
    append,
    overwrite,
    edit_header,
    edit_header,
    move_shards,
    swap_tensors,
    from_another_model,
    edit_json,
    edit_json,
    edit_json,
)

# ---- loading it ------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(48).reshape(2, 24) % 64


class Hang(BaseException):
    """A load that does not end."""


def load(folder: Path) -> PreTrainedModel:
    """As users do."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def verdict(folder: Path, whole: PreTrainedModel, *, ours: bool) -> str:
    """What loading does: "identical", "refused ..." or "WRONG ...".

    Args:
        folder: the damaged checkpoint.
        whole: the model that was saved.
        ours: load as the command line does, where every error must be one of ours. Else as users do, where an error
            of transformers' or safetensors' is as good, but none that comes from inside this package.
    """
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        model = load_model(folder) if ours else load(folder)
        same = model.state_dict().keys() == whole.state_dict().keys() and all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
        )
        if not same:
            return "WRONG: other weights"
        return "identical" if torch.equal(model(TOKENS).logits, whole(TOKENS).logits) else "WRONG: other logits"
    except HfQuantError as error:
        return f"refused {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        frames = traceback.extract_tb(error.__traceback__)
        inside = str(Path(hf_quant.__file__).parent)
        return (
            f"WRONG: {told}" if ours or frames[-1].filename.startswith(inside) else f"refused by transformers, {told}"
        )
    except Hang:
        return f"WRONG: hangs for {SECONDS} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(source: Path, first: int, last: int) -> None:
    """See the module."""

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    whole = load(source)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        shutil.copytree(source.parent / "sibling", Path(temporary) / "sibling")
        for case in range(first, last):
            rng = random.Random(case)
            folder = Path(temporary) / "model"
            shutil.copytree(source, folder)
            damage = rng.choice(DAMAGES)
            try:
                told = damage(rng, folder)
                sys.stdout.write(json.dumps({"case": case, "damage": told}) + "\n")  # first: a crash ends us here
                sys.stdout.flush()
                sys.stdout.write(
                    json.dumps({"case": case, "verdict": verdict(folder, whole, ours=case % 2 == 0)}) + "\n"
                )
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
