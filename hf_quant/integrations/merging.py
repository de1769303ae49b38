"""Merge adapters into quantized layers: the same grid and storage, other codes. What a plain merge loses, is measured.

PEFT merges into whatever `.weight` takes; written into a quantized layer, that is rounding to nearest, layer for layer.
Here the merged weight is a new weight to quantize: it is exact where the adapter is constant within a block of float
zero points, else the solver that made the layer solves it again, on statistics where there are some.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import collect, run_model
from hf_quant.config import QuantConfig
from hf_quant.coverage import matches
from hf_quant.errors import ConfigError, NotSupported, UnsupportedModel
from hf_quant.method import did_you_mean
from hf_quant.qtensor import QTensor, as_blocks, nearest, with_outer, without_outer
from hf_quant.recipe import Recipe
from hf_quant.report import Entry, Report
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.sites import find_blocks
from hf_quant.solve import rotated
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.sampler import TextSampler
from hf_quant.stats import Gram, Stat, State, hessian

GRAM = Gram()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """One layer after a merge.

    Attributes:
        name: of the layer in the base model.
        how: "zero points" (exact), the solver's name, "nearest" (on the scales as they were) or "unchanged".
        error: `tr(E H E^T) / tr(W H W^T)` of the merged weight; H is the identity without statistics.
        lost: the same error over the size of the adapter's own change: 0 is exact, 1 is as bad as leaving it out.
    """

    name: str
    how: str
    error: float
    lost: float


@torch.no_grad()
def merge_adapter(
    model: nn.Module,
    adapters: str | Sequence[str] | None = None,
    *,
    data: Any = None,  # noqa: ANN401  many kinds, see QuantConfig
    processor: Any = None,  # noqa: ANN401
    statistics: Mapping[str, State] | None = None,
) -> tuple[Merged, ...]:
    """Merge the active adapters into the quantized layers, which keep their grids and formats.

    `model.unload()` then gives the plain model, which saves and loads as every other; `unmerge_adapter` goes back.

    Args:
        model: a `PeftModel` on a quantized base, or one with adapters added to it.
        adapters: names; None: those that are active.
        data: what to take input statistics on, with the adapters at work; None: none, weights count alike.
        processor: tokenizer for texts.
        statistics: of an earlier `collect_statistics`, instead of data.

    Returns:
        An entry a layer.

    Raises:
        UnsupportedModel: no adapter on a quantized layer, or one is merged already.
        NotSupported: the adapter is no change of weights (prompts, functions of the input).
        ConfigError: there is no adapter of this name.
    """
    layers = dict(tuned_layers(model))
    if not layers:
        raise UnsupportedModel("there is no adapter on a quantized layer of this model; train or load one with PEFT")
    there = sorted(getattr(model, "peft_config", ()))
    wanted = [adapters] if isinstance(adapters, str) else None if adapters is None else list(adapters)
    for name in wanted or ():
        if name not in there:
            raise ConfigError(f"no adapter {name!r}{did_you_mean(str(name), there)}; there are: {', '.join(there)}")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise UnsupportedModel(f"{merged[0]} holds merged adapters already; call hf_quant.unmerge_adapter(model) first")
    if data is not None and statistics is None:
        statistics = collect_statistics(model, data, processor=processor)
    recipes = _recipes(model)
    targets: list[Merged] = []
    undo: list[Undo] = []
    try:
        for name, layer in layers.items():
            state = (statistics or {}).get(name)
            undo.append(Undo(layer))
            targets.append(_merge(name, layer, wanted, recipes(name), state))
            layer.unmerge = undo[-1]
    except BaseException:
        for one in undo:
            one()
        raise
    undo[0].note = _note(model, layers, targets)
    return tuple(targets)


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Take merged adapters out again: the packed tensors are those of before, to the bit.

    Raises:
        UnsupportedModel: nothing was merged by `merge_adapter`.
    """
    merged = [layer for _, layer in tuned_layers(model) if isinstance(layer.__dict__.get("unmerge"), Undo)]
    if not merged:
        raise UnsupportedModel("nothing is merged here by hf_quant.merge_adapter, so there is nothing to take out")
    for layer in merged:
        layer.unmerge()


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    data: Any,  # noqa: ANN401
    *,
    processor: Any = None,  # noqa: ANN401
    samples: int = 128,
    length: int = 512,
) -> dict[str, State]:
    """Second moments of the inputs of every quantized layer with an adapter, the adapters at work: name -> state.

    The tensors are plain (`safetensors` stores them), so an expensive pass over data serves several merges.
    """
    found = input_statistics(model, dict(tuned_layers(model)), data, processor, (GRAM,), TextSampler(samples, length))
    return {name: states[GRAM] for name, states in found.items()}


def input_statistics(
    model: nn.Module,
    layers: Mapping[str, Any],
    data: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    needs: tuple[Stat, ...],
    sampler: TextSampler | None = None,
) -> dict[str, dict[Stat, State]]:
    """Statistics of the inputs of PEFT layers, the adapters at work; those that the data never reaches are missing."""
    base = _base(model)
    batches = (sampler or TextSampler()).sample(data, processor, 0, base)
    inside = {id(m): path for path, m in base.named_modules()}
    device = next(base.parameters()).device
    found: dict[str, dict[Stat, State]] = {}
    blocks = (*find_blocks(base), "")
    was_training = model.training
    model.eval()
    try:
        for block in blocks:  # one block's matrices at a time
            names = [n for n in layers if n not in found and (n.startswith(block + ".") or not block)]
            wanted = {inside[id(layers[n])]: needs for n in names}
            if wanted:
                states = collect(base, lambda m, i: run_model(m, batches[i], device), batches, wanted, None)
                found.update((n, states[p]) for n, p in zip(names, wanted, strict=True) if p in states)
    finally:
        model.train(was_training)
    return found


class Undo:
    """Puts a layer back to what it was. Stands in for PEFT's own `unmerge` of the layer, which would round again."""

    def __init__(self, layer: Any) -> None:  # noqa: ANN401  a PEFT layer
        base: QuantLinear = layer.base_layer
        self.layer = layer
        self.note: tuple[Any, Report | None] | None = None  # of the model, kept by one of its layers
        self.tensors = {n: t.clone() for n, t in base.packed_tensors().items()}
        self.bias = None if base.bias is None else base.bias.detach().clone()

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore."""
        base: QuantLinear = self.layer.base_layer
        _write(base, self.tensors, self.bias)
        self.layer.merged_adapters.clear()
        self.layer.__dict__.pop("unmerge", None)
        if self.note is not None:
            quantizer, report = self.note
            quantizer.report = report
            quantizer.quantization_config.made_by.pop("merged", None)


def before_merge(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """id of a layer that holds merged adapters -> its packed tensors without them."""
    undo = [layer.__dict__.get("unmerge") for _, layer in tuned_layers(model)]
    return {id(u.layer.base_layer): u.tensors for u in undo if isinstance(u, Undo)}


def _base(model: nn.Module) -> Any:  # noqa: ANN401  the model under the adapters
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of the quantized layer, PEFT's layer around it)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in _base(model).named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), QuantLinear):
            yield name.replace(".base_layer", ""), module


def _recipes(model: nn.Module) -> Any:  # noqa: ANN401  name -> Recipe
    """How each layer was quantized, as far as the model's config tells; else nearest rounding."""
    config = getattr(getattr(_base(model), "hf_quantizer", None), "quantization_config", None)
    made_by = getattr(config, "made_by", None) or {}
    plain = Recipe(weights=int_spec(4))
    try:
        again = QuantConfig(made_by["method"], overrides=made_by.get("overrides"), **made_by.get("arguments", {}))
        base, own = again.quantizer(), again.overridden()
    except (KeyError, TypeError, ConfigError):
        return lambda name: plain
    found = base if isinstance(base, Recipe) else plain

    def recipe(name: str) -> Recipe:
        return next((r for pattern, r in own.items() if r is not None and matches(name, [pattern])), found)

    return recipe


def _target(name: str, layer: Any, adapters: list[str] | None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ANN401
    """Weights without and with the adapters, float32, and the bias: PEFT merges into a dense twin of the layer."""
    base: QuantLinear = layer.base_layer
    n, k = base.matrix_shape
    twin = nn.Linear(k, n, bias=False, device="meta")
    before = base.dequantize(torch.float32)
    twin.weight = nn.Parameter(before.clone(), requires_grad=False)
    twin.bias = None if base.bias is None else nn.Parameter(base.bias.detach().float().clone(), requires_grad=False)
    layer.base_layer = twin
    try:
        layer.merge(adapter_names=adapters)
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise NotSupported(
            f"the adapter on {name} ({type(layer).__module__.split('.')[-2]}) cannot be written as a change of its "
            f"weight: {error}; keep it as an adapter"
        ) from error
    finally:
        layer.base_layer = base
    return before, twin.weight.detach(), None if twin.bias is None else twin.bias.detach()


def _merge(
    name: str,
    layer: Any,  # noqa: ANN401
    adapters: list[str] | None,
    recipe: Recipe,
    state: State | None,
) -> Merged:
    base: QuantLinear = layer.base_layer
    before, wanted, bias = _target(name, layer, adapters)
    if not bool(torch.isfinite(wanted).all()):
        raise UnsupportedModel(f"the adapter on {name} gives NaN or infinite weights; it is damaged")
    H = hessian({GRAM: state}).to(wanted.device) if state is not None else None
    if H is not None and base.pre_scale is not None:
        s = base.pre_scale.float()
        H = H * s[:, None] * s
    target = base._without_extras(wanted)
    q = base.qtensor()
    found = [("unchanged", q), *_candidates(target, target - base._without_extras(before), q, recipe, H)]
    how, best = min(found, key=lambda c: _size(target - c[1].dequantize(), H))
    lost = _size(target - best.dequantize(), H)
    moved = _size(target - base._without_extras(before), H)
    _write(base, base.format.pack(best), bias)
    return Merged(
        name=name, how=how, error=lost / max(_size(target, H), 1e-30), lost=lost / moved if moved > 0 else 0.0
    )


def _candidates(
    target: Tensor, delta: Tensor, q: QTensor, recipe: Recipe, H: Tensor | None
) -> Iterator[tuple[str, QTensor]]:
    inner, spec, outer = without_outer(target, q.spec)
    if q.nested is None and q.codebook is None and not q.spec.outer:
        yield "nearest", nearest(target, q.scale, q.zero, spec)
    shift = _shift(delta, q)
    if shift is not None:
        yield "zero points", shift
    if recipe.solver.refuses(spec) is None:
        quadratic = None if H is None else rotated(Quadratic(H), q.spec.rotation)
        solved = recipe.solver.solve(inner, spec, recipe.range, quadratic)
        yield type(recipe.solver).__name__, with_outer(solved, q.spec, outer)
    elif q.spec.grid.vector == 1:
        yield "nearest", refit(target, q.spec)


def _shift(delta: Tensor, q: QTensor) -> QTensor | None:
    """A change that is one value a block moves the block's float zero point: `W + d = (code - (zero - d / s)) s`."""
    if q.spec.zero != "float" or q.zero is None or q.nested is not None:
        return None
    low, high = (_extreme(delta, q, sign) for sign in (-1, 1))
    if bool((high - low > 1e-5 * q.scale).any()):
        return None
    return replace(q, zero=q.zero - (low + high) / 2 / q.scale)


def _extreme(delta: Tensor, q: QTensor, sign: int) -> Tensor:
    """Largest (+1) or smallest (-1) value of each block; padding does not count."""
    inside = as_blocks(torch.ones_like(delta), q.spec) > 0
    return sign * (sign * as_blocks(delta, q.spec)).masked_fill(~inside, -torch.inf).amax(-1)


def _write(base: QuantLinear, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
    base.prepare()  # canonical tensors are kept again
    for name, tensor in tensors.items():
        parameter = getattr(base, name)
        parameter.copy_(tensor.to(parameter.device))
    if bias is not None and base.bias is not None:
        base.bias.copy_(bias.to(base.bias.dtype))
    base.prepare()


def _size(M_NK: Tensor, H_KK: Tensor | None) -> float:
    """`tr(M H M^T)`."""
    return float(M_NK.square().sum() if H_KK is None else (M_NK @ H_KK * M_NK).sum())


def _note(model: nn.Module, layers: Mapping[str, Any], merged: list[Merged]) -> tuple[Any, Report | None] | None:
    """Leave word of the merge in what is saved with the model; returns the quantizer and its report of before."""
    quantizer = getattr(_base(model), "hf_quantizer", None)
    made_by = getattr(getattr(quantizer, "quantization_config", None), "made_by", None)
    if quantizer is None or made_by is None:
        return None
    before: Report | None = quantizer.report
    names = sorted({a for layer in layers.values() for a in layer.merged_adapters})
    made_by["merged"] = {"adapters": names, "lost": sum(m.lost for m in merged) / len(merged)}
    if before is not None:
        errors = {m.name + ".weight": m for m in merged}
        coverage = tuple(_merged_entry(e, errors.get(e.name)) for e in before.coverage)
        quantizer.report = replace(before, coverage=coverage, measured={})  # what was measured is another model
    return quantizer, before


def _merged_entry(entry: Entry, merged: Merged | None) -> Entry:
    return entry if merged is None else replace(entry, error=merged.error, reason=f"an adapter is merged: {merged.how}")
