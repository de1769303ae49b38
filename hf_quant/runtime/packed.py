"""Packed: what quantized linears and embeddings share. A matrix held as the canonical tensors of a packed format."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_quant.codebooks import fit_codebooks
from hf_quant.errors import UnsupportedModel, UnsupportedSpec
from hf_quant.formats import Layer, PackedFormat, format_named
from hf_quant.grids import CodebookGrid
from hf_quant.qtensor import QTensor, as_blocks, from_extremes, nearest, with_outer, without_outer
from hf_quant.running.resources import release_mapped
from hf_quant.runtime.laid_out import LaidOut, hold, is_shared
from hf_quant.runtime.weight_view import WeightView
from hf_quant.spec import Spec

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parts_of(model: object) -> dict[str, nn.Module]:
    """A model by itself, named "", or the networks of a pipeline of diffusers by name.

    Raises:
        UnsupportedModel: neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModel(f"this takes a model in memory, or a pipeline of diffusers, not {type(model).__name__}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


class Packed(nn.Module, ABC):
    """Mixin: the canonical tensors are frozen Parameters under the format's names, `.weight` is a lazy logical view.

    No cast (`.half()`, `.to(dtype)`) changes the value of a weight: it changes `compute_dtype`, and scales follow only
    where the new type holds every one of them exactly (so that `model.dtype`, the first floating Parameter's, is
    right). They are saved in the type of the layout. Whoever writes into packed tensors in place calls `prepare()`.
    Once a kernel's layout is made, the tensors that it replaces are not kept beside it: the Parameters are `LaidOut`.

    Attributes:
        format: the packed format.
        layer: the layer as the format sees it, whole (not a shard of it).
        compute_dtype: type of `.weight` and of the activations that the kernel was chosen for.
        kernel: name of the kernel that runs; "reference", or "lookup" for an embedding.
        refused: why each kernel before it refused.
    """

    format: PackedFormat
    layer: Layer
    compute_dtype: torch.dtype
    kernel: str
    refused: dict[str, str]
    qweight: nn.Parameter
    _names: tuple[str, ...]
    _qweight_shape: tuple[int, ...]
    _blob: list[Tensor] | None  # None: the kernel is chosen, its layout not made yet
    _ready: tuple[torch.device, torch.dtype] | None
    _hf_quantized_needs_local_tp: ClassVar[bool] = True  # tensor parallelism hands local tensors to forward
    _expose_weight: ClassVar[bool] = False

    def _hold(self, fmt: PackedFormat, layer: Layer, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Adopt the canonical tensors (of the layout's names)."""
        self.format, self.layer, self.compute_dtype = fmt, layer, dtype
        layout = fmt.layout(layer)
        self._names, self._qweight_shape = tuple(layout), layout["qweight"][0]
        self._unprepare()
        # models ask the first parameter of a module, or the first floating one, for the type to compute in
        for name in sorted(layout, key=lambda name: layout[name][1] not in COMPUTE_DTYPES):
            self.register_parameter(name, frozen(tensors[name]))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the logical weight."""
        return self.layer.shape

    @property
    def weight(self) -> Tensor:
        """The logical weight: a `WeightView`, or while compiling the dequantized matrix (dropped when unused)."""
        return self.dequantize() if torch.compiler.is_compiling() else WeightView(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not (isinstance(value, WeightView) and value.owner is self):
            self.requantize_(value)

    def packed_tensors(self, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Name -> canonical tensor (local shards under tensor parallelism); those that were laid out are restored."""
        found = {name: local(getattr(self, name)) for name in self._names if name not in without}
        return {name: t.restored() if isinstance(t, LaidOut) else t for name, t in found.items()}

    def qtensor(self) -> QTensor:
        """The codes, scales and zero points."""
        return self.format.unpack(self.packed_tensors(), self.local_layer())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The logical weight `[N, K]`, dense, in `dtype` (default: the compute dtype)."""
        return self.format.weight(self.packed_tensors(), self.local_layer(), dtype or self.compute_dtype)

    @torch.no_grad()
    def requantize_(self, W_NK: Tensor) -> None:
        """Quantize another logical weight into this module: min-max ranges, then nearest. Lossy, in place.

        Branches and pre-scales stay as they are; the codes take up the difference.

        Raises:
            UnsupportedSpec: it has another shape.
        """
        if tuple(W_NK.shape) != self.matrix_shape:
            raise UnsupportedSpec(
                f"a weight of shape {list(W_NK.shape)} cannot be assigned to a quantized {list(self.matrix_shape)}; "
                "dequantize the model first"
            )
        _tell_of_writing()
        self._take_back()
        packed = self.format.pack(refit(self._without_extras(W_NK.detach()), self.layer.weights))
        for name, tensor in packed.items():
            parameter = getattr(self, name)
            parameter.copy_(tensor.to(parameter.device))
        self.prepare()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about this module besides its shape, JSON-safe."""

    def _without_extras(self, W_NK: Tensor) -> Tensor:
        """What the codes must hold for the logical weight to be `W_NK`."""
        return W_NK

    @property
    def prepared(self) -> bool:
        """Whether a kernel was chosen for the tensors at hand."""
        return self._ready is not None

    def _unprepare(self) -> None:
        self._take_back()
        self.kernel, self.refused, self._blob, self._ready = "reference", {}, [], None

    @torch.no_grad()
    def _let_go(self, layer: Layer) -> None:
        """Keep no tensor that the layout holds as well: not where others share it, or a hook moves it."""
        assert self._blob is not None  # noqa: S101  it was made just now
        found = self.format.restore(self._blob, layer, self.kernel)
        kept = {name: self._parameters.get(name) for name in found}
        if hasattr(self, "_hf_hook") or any(t is None or hasattr(t, "to_local") or is_shared(t) for t in kept.values()):
            return
        if all(torch.equal(tensor, getattr(self, name)) for name, tensor in found.items()):
            for name in found:
                canonical = getattr(self, name)
                self._parameters[name] = frozen(LaidOut.of(self, name, self._blob, layer))
                release_mapped(canonical)

    def _take_back(self) -> None:
        """Keep the canonical tensors again."""
        with torch.inference_mode(False), torch.no_grad():  # what lasts must be usable in training
            for name, tensor in self._parameters.items():
                if isinstance(tensor, LaidOut):
                    self._parameters[name] = frozen(tensor.restored())

    @abstractmethod
    def prepare(self) -> None:
        """Make ready to run on the device where the tensors are; nothing happens on the meta device."""

    @torch.no_grad()
    def _settle(self) -> None:
        """Floating tensors into the compute dtype where that changes no value (see the class)."""
        hold(self, self.packed_parameters())
        for parameter in self.packed_parameters():
            wide = parameter.is_floating_point() and parameter.element_size() > 1  # 8-bit floats are codes: they stay
            if wide and not hasattr(parameter, "to_local"):
                parameter.data = _where_exact(parameter.data, self.compute_dtype)

    def local_layer(self) -> Layer:
        """The layer of the tensors at hand: of a shard under tensor parallelism (N goes with qweight's rows, K with
        its columns), else the whole.
        """
        qweight, whole = local(self.qweight), self._qweight_shape
        if tuple(qweight.shape) == whole:
            return self.layer
        (n, k), (rows, columns) = self.layer.shape, whole
        return replace(self.layer, shape=(n * qweight.shape[0] // rows, k * qweight.shape[1] // columns))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        self._take_back()
        packed = {id(p) for p in self.packed_parameters()}
        if self.qweight.device.type != "meta":
            dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
            self.compute_dtype = dtype if dtype in COMPUTE_DTYPES else self.compute_dtype

        def keep_type(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in packed and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(keep_type, recurse)  # type: ignore[no-untyped-call]
        self.prepare()
        return self

    def packed_parameters(self) -> list[nn.Parameter]:
        """The canonical tensors as they are registered."""
        return [getattr(self, name) for name in self._names]

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  nn.Module's own
        if name == "weight":  # nn.Module would register a Parameter over the property
            object.__setattr__(self, name, value)
            return
        super().__setattr__(name, value)
        if name == "qweight" and isinstance(value, Tensor):
            self._unprepare()  # a loader or tie_weights replaced it; the blob would be of the old one

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._parameters.items():
            if isinstance(tensor, LaidOut):
                destination[prefix + name] = tensor.restored()
        if not keep_vars:  # PEFT upcasts scales to float32 in memory; what is saved has the type of the layout
            for name, (_, dtype) in self.format.layout(self.layer).items():
                destination[prefix + name] = destination[prefix + name].to(dtype)
        if Packed._expose_weight:
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self._take_back()
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        """Without the blob, which belongs to this process; and with the format by its id."""
        parameters = dict(self._parameters)
        for name, tensor in self._parameters.items():
            if isinstance(tensor, LaidOut):
                parameters[name] = frozen(tensor.restored())
        state = {**self.__dict__, "format": self.format.id, "_parameters": parameters}
        for name in ("kernel", "refused", "_blob", "_ready"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Look the format up again and prepare."""
        super().__setstate__(  # type: ignore[no-untyped-call]
            {**state, "format": format_named(state["format"])}
        )
        self.prepare()

    def reset_parameters(self) -> None:
        """Nothing to reset: the weights come from a checkpoint or a solver."""


@cache
def _tell_of_writing() -> None:
    """Once a process: whoever merges an adapter in place should know what it costs, and of the better way."""
    logging.getLogger("hf_quant").warning(
        "a dense weight was written into a quantized layer and rounded to nearest, which loses much of a small change. "
        "To merge an adapter, hf_quant.merge_adapter(model) solves the layer again, says what is lost, and "
        "hf_quant.unmerge_adapter(model) goes back to the bit; hf_quant.dequantize(model) first loses nothing"
    )


def frozen(tensor: Tensor) -> nn.Parameter:
    """As a Parameter that never trains (keeps an existing Parameter, so ties survive)."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def refit(W_NK: Tensor, spec: Spec) -> QTensor:
    """Nearest codes with min-max ranges; a codebook is fitted by k-means."""
    W_NK, inner, outer = without_outer(W_NK, spec)
    if isinstance(inner.grid, CodebookGrid):
        return with_outer(fit_codebooks(W_NK, inner), spec, outer)
    blocks = as_blocks(W_NK, inner)
    scale, zero = from_extremes(blocks.amin(-1), blocks.amax(-1), inner)
    return with_outer(nearest(W_NK, scale, zero, inner), spec, outer)


def _where_exact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` when that holds every value, else as it is."""
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.double(), tensor.double()) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor under tensor parallelism, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def expose_logical_weights() -> Iterator[None]:
    """Inside, `state_dict()` also lists `<name>.weight` (the lazy view), for code that looks shapes up by key."""
    before, Packed._expose_weight = Packed._expose_weight, True
    try:
        yield
    finally:
        Packed._expose_weight = before
