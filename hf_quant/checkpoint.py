"""A quantized module tree <-> versioned JSON, and the checks that stand between a damaged file and a wrong model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from hf_quant.errors import CheckpointError
from hf_quant.integrity import Stored, dtype_name
from hf_quant.running.resources import release_freed
from hf_quant.runtime.apart import can_take_apart, stand_in_for
from hf_quant.runtime.embedding import QuantEmbedding, retie
from hf_quant.runtime.features import FeatureTable, Vacant
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import Packed
from hf_quant.sites import linear_shape, outputs_of

VERSION = 1
KINDS: dict[type[nn.Module], str] = {QuantEmbedding: "embedding", FeatureTable: "features", Vacant: "vacant"}


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """(name, module) of everything quantized, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield name, module


def describe(model: nn.Module) -> dict[str, Any]:
    """`{"version": 1, "sites": [...]}`: each entry is a kind, a format with its specs, and the modules that share it.

    Names that differ in numbers only are written as ranges: `model.layers.[0-31].mlp.down_proj`. Shapes and biases
    are not stored: the model class knows them.
    """
    sites: list[dict[str, Any]] = []
    names: list[list[str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, Packed | Vacant):
            continue
        kind = next((word for type_, word in KINDS.items() if isinstance(module, type_)), "linear")
        entry = {"kind": kind, **module.describe()}
        if entry not in sites:
            sites.append(entry)
            names.append([])
        names[sites.index(entry)].append(name)
    return {"version": VERSION, "sites": [{**s, "modules": fold(n)} for s, n in zip(sites, names, strict=True)]}


def build_skeleton(model: nn.Module, description: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Replace the described modules of a meta model by empty quantized ones; returns their names in the model.

    The names may lack or have the base model's prefix (`AutoModel` of a checkpoint saved with a head, or the
    reverse); modules that this class does not have are left out, as its float weights would be.

    Raises:
        CheckpointError: a newer version, an unknown format, or a description that does not fit the model.
    """
    entries = _entries(description)
    built = []
    for entry in sorted(entries, key=lambda e: e.get("kind") != "features"):  # layers may lie inside those
        for described in unfold(entry["modules"]):
            name = _resolve(model, described)
            if name is None:
                continue
            try:
                module = _empty(model.get_submodule(name), entry, dtype)
            except Exception as error:  # whatever a damaged description makes go wrong
                raise CheckpointError(f"quantization_config: site {described}: {_text(error)}") from error
            model.set_submodule(name, module)
            built.append(name)
    if entries and not built:
        raise CheckpointError(
            f"quantization_config describes modules that {type(model).__name__} does not have, such as "
            f"{unfold(entries[0]['modules'])[0]!r}; load it with the class it was saved with"
        )
    retie(model)
    return built


def _entries(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sites of a description that has the right form and version."""
    version = description.get("version") if isinstance(description, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"quantization_config: version {version!r} is not one of ours; the file is damaged")
    if version > VERSION:
        raise CheckpointError(
            f"quantization_config: version {version} is newer than this hf-quant reads ({VERSION}); upgrade hf-quant"
        )
    entries = description.get("sites")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise CheckpointError("quantization_config: `sites` is not a list of objects; the file is damaged")
    for entry in entries:
        modules = entry.get("modules")
        if not isinstance(modules, list) or not modules or not all(isinstance(m, str) for m in modules):
            raise CheckpointError("quantization_config: a site without a list of module names; the file is damaged")
    return entries


def _empty(module: nn.Module, entry: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The empty quantized module that takes the place of a float one."""
    data = {k: v for k, v in entry.items() if k not in ("kind", "modules")}
    if entry["kind"] == "vacant":
        return Vacant(outputs_of(module))
    if not isinstance(data["format"], str):
        raise TypeError(f"format={data['format']!r} is not a name")
    packed: Packed
    if entry["kind"] == "embedding":
        if not isinstance(module, nn.Embedding):
            raise TypeError(f"is a {type(module).__name__}, not an embedding")
        packed = QuantEmbedding.from_json(data, like=module, dtype=dtype)
    elif entry["kind"] == "features":
        packed = FeatureTable.from_json(data, outputs_of(module), inner=module, dtype=dtype)
    else:
        found = linear_shape(module)
        if entry["kind"] != "linear" or found is None:
            raise TypeError(f"is a {type(module).__name__}, which cannot be a quantized {entry['kind']!r}")
        packed = QuantLinear.from_json(data, found[1], kind=found[0], bias=module.bias is not None, dtype=dtype)
    reason = packed.format.holds(packed.layer)
    if reason is not None:
        raise ValueError(f"{packed.format.id} cannot hold it: {reason}")
    return packed


def _resolve(model: nn.Module, described: str) -> str | None:
    """The described module's name in this model, or None; what is on the way is taken apart."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (described, f"{prefix}.{described}", described.removeprefix(f"{prefix}.")):
        try:
            model.get_submodule(name)
        except AttributeError:
            if not _taken_apart_on_the_way(model, name):
                continue
        return name
    return None


def _taken_apart_on_the_way(model: nn.Module, name: str) -> bool:
    """True when `name` is a matrix of a module that is to be taken apart, which then is."""
    parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
    for parent in reversed(parents):
        try:
            module = model.get_submodule(parent)
            if can_take_apart(module):
                model.set_submodule(parent, stand_in_for(module))
                model.get_submodule(name)
                return True
        except AttributeError:
            pass
    return False


def prepare_all(model: nn.Module) -> None:
    """Choose kernels and build blobs, once the tensors are where they stay; freezes scales a loader made trainable."""
    for _, module in packed_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if name != "bias":
                parameter.requires_grad_(False)
        if not module.prepared:
            module.prepare()
            release_freed()


def check_present(model: nn.Module, header: Mapping[str, Stored]) -> None:
    """Check a skeleton against what its checkpoint holds, before anything is loaded.

    `header` is `integrity.read_header`'s with the names of the model: transformers' renamings undone.

    Raises:
        CheckpointError: naming the first packed tensor that is missing, or of another shape or type.
    """
    for name, module in packed_modules(model):
        for key, tensor in module.state_dict().items():
            stored = header.get(f"{name}.{key}")
            if stored is None:
                if f"{name}.{key}" not in getattr(model, "all_tied_weights_keys", {}):
                    raise CheckpointError(f"{name}.{key} is not in the checkpoint; a shard is missing or damaged")
                continue
            packed = key in module.packed_tensors()  # what is kept in full precision is cast on loading
            if stored.shape != tuple(tensor.shape) or (packed and stored.dtype != dtype_name(tensor.dtype)):
                raise CheckpointError(
                    f"{stored.file}: {name}.{key} is {stored.dtype} {list(stored.shape)} where "
                    f"{dtype_name(tensor.dtype)} {list(tensor.shape)} is expected; config.json and file do not fit"
                )


def validate(model: nn.Module) -> None:
    """Check every packed tensor that was loaded: present, of the layout's shape and type, finite, sane.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    for name, module in packed_modules(model):
        tensors = module.packed_tensors()
        if any(t.device.type == "meta" for t in tensors.values()):
            continue  # offloaded: its bytes were covered by the file's checksums
        reason = module.format.check(tensors, module.local_layer())
        extra = {n: p for n, p in module.named_parameters(recurse=False) if n not in tensors}
        for key, tensor in extra.items():
            if not bool(torch.isfinite(tensor).all()):
                reason = reason or f"{key} holds NaN or infinite values"
        if isinstance(module, QuantLinear):
            reason = reason or module.check_branches()
        if reason is not None:
            raise CheckpointError(f"{name}: {reason}; the checkpoint is damaged, get it again")


_RANGE = re.compile(r"\[(\d+)-(\d+)\]")


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only, and cover whole ranges of them, become one: `a.[0-3].b`."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        key = tuple("#" if p.isdecimal() and p == str(int(p)) else p for p in parts)
        groups.setdefault(key, []).append(tuple(int(p) for p, k in zip(parts, key, strict=True) if k == "#"))
    folded: list[str] = []
    for key, numbers in groups.items():
        axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
        ranges = [(axis[0], axis[-1]) for axis in axes]
        size = 1
        for low, high in ranges:
            size *= high - low + 1
        whole = size == len(numbers)
        for point in [None] if whole else numbers:
            texts = iter(map(_range_text, ranges) if point is None else map(str, point))
            folded.append(".".join(next(texts) if part == "#" else part for part in key))
    return folded


def _range_text(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"[{bounds[0]}-{bounds[1]}]"


def unfold(folded: Iterable[str], limit: int = 1 << 22) -> list[str]:
    """Inverse of `fold`, up to order.

    Raises:
        CheckpointError: a range of absurd size.
    """
    names: list[str] = []
    for pattern in folded:
        bounds = [(int(m[1]), int(m[2])) for m in _RANGE.finditer(pattern)]
        template = _RANGE.sub("{}", pattern.replace("{", "{{").replace("}", "}}"))
        size = 1
        for low, high in bounds:
            size *= max(high - low + 1, 0)
        if size == 0 or size + len(names) > limit:
            raise CheckpointError(f"quantization_config: {pattern!r} names {size} modules; the file is damaged")
        names += [template.format(*point) for point in product(*(range(a, b + 1) for a, b in bounds))]
    return names


def _text(error: BaseException) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
