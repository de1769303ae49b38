"""PackedFormat: a codec with its kernels, and the lookup of formats by id.

Two layouts, never confused: *canonical* tensors are what is saved, the same on every device; a *blob* is made from
them at load for one kernel and lives only in memory.
"""

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_quant.errors import CheckpointError, ConfigError, UnsupportedSpec
from hf_quant.finite import all_finite
from hf_quant.hadamard import Hadamard
from hf_quant.installed import broken, brought, tuples_of
from hf_quant.product_gradient import gradient_operator
from hf_quant.products import product
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import check_input, fake_quantize, input_layout
from hf_quant.spec import Spec

Tensors = Mapping[str, Tensor]
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layer:
    """What a format and its kernels are told about a layer: shape (N, K), weight spec, input spec or None.

    It describes the tensors at hand: under tensor parallelism, this rank's shard. `key` is the layer as canonical
    JSON, the form in which it travels through an operator.
    """

    shape: Shape
    weights: Spec
    inputs: Spec | None = None
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        inputs = self.inputs.to_json() if self.inputs else None
        data = {"shape": list(self.shape), "weights": self.weights.to_json(), "inputs": inputs}
        object.__setattr__(self, "key", json.dumps(data, separators=(",", ":")))

    @staticmethod
    @cache
    def from_key(key: str) -> "Layer":
        """Inverse of `key`."""
        data = json.loads(key)
        inputs = Spec.from_json(data["inputs"]) if data["inputs"] else None
        return Layer(tuple(data["shape"]), Spec.from_json(data["weights"]), inputs)


class Kernel(Protocol):
    """One way to compute `y = q(x) W^T` from canonical tensors."""

    @property
    def name(self) -> str:
        """Unique within its format; "reference" is taken."""

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        """None when this kernel can run such a layer, else the reason why not. Static facts only."""

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        """Canonical tensors -> blob (possibly empty). Called once, eagerly, after load or a device move."""

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        """`x_TK` [T, K] -> [T, N] in x's dtype, without bias. May choose by T; T can be 0."""


@runtime_checkable
class Restoring(Kernel, Protocol):
    """A kernel whose blob is canonical tensors in another order: they need not be kept, `run` goes without them."""

    @property
    def replaces(self) -> tuple[str, ...]:
        """Names of these tensors."""

    def restore(self, blob: list[Tensor], layer: Layer) -> Tensors:
        """These tensors again, to the bit: the inverse of `prepare`."""


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """What a layer does besides the product, for kernels that take it on: `y = q(x R) W^T + a up^T`.

    Attributes:
        low_rank: `a` `[T, R]` and `up` `[N, R]`.
        rotation: R, of an input that is rounded.
        entry_T: int64 `[T]`: the row of the table of input ranges that each token is rounded with.
    """

    low_rank: tuple[Tensor, Tensor] | None = None
    rotation: Hadamard | None = None
    entry_T: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int | None]:
        """As the operator takes it."""
        size, seed = (0, None) if self.rotation is None else (self.rotation.size, self.rotation.seed)
        a, up = self.low_rank or (None, None)
        return a, up, self.entry_T, size, seed


ALONE = Around()


@runtime_checkable
class Fusing(Kernel, Protocol):
    """A kernel that does in its own passes what stands around the product."""

    def fuses(self, layer: Layer) -> frozenset[str]:
        """Names of `Around`'s attributes that it takes on for such a layer."""

    def fused(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, around: Around) -> Tensor:
        """`run`, and what is around it."""


@runtime_checkable
class Grouping(Restoring, Protocol):
    """A kernel that multiplies every row by the weight of its own expert, in one launch and from blobs alone."""

    def grouped(self, x_TK: Tensor, experts_TC: Tensor, blob: list[Tensor], layer: Layer) -> Tensor:
        """`[T, K]`, the C experts of each token -> `[T C, N]`; rows of no expert (`0 .. E - 1`) are 0.

        The blob's tensors are those of E layers, stacked.
        """

    def dense(self, blob: list[Tensor], layer: Layer, dtype: torch.dtype) -> Tensor:
        """`W_NK` of one layer's blob: the bits of `PackedFormat.weight`."""


class PackedFormat(ABC):
    """A promise: the same id and the same bytes mean the same weights for ever. Other bytes need a new id.

    Every instance owns one `torch.library` operator, so a layer is one node for `torch.compile`, with a fake and the
    gradient to x (straight through the rounding of x).
    """

    id: str
    priority: ClassVar[int] = 0  # the plan takes the highest that holds the layer
    kernels: tuple[Kernel, ...] = ()  # tried in order; the reference is always last

    def __init__(self) -> None:
        """Register the operators.

        Raises:
            ConfigError: another format has this id (torch would let the later one take over the operator).
        """
        if self.id in _IDS:
            raise ConfigError(f"format {self.id!r} exists already; {type(self).__name__} needs an id of its own")
        self.replaces = {k.name: k.replaces for k in self.kernels if isinstance(k, Restoring)}
        self.groups = frozenset(k.name for k in self.kernels if isinstance(k, Grouping))
        self.op, self._restore = _register(self)
        _IDS.add(self.id)

    @abstractmethod
    def holds(self, layer: Layer) -> str | None:
        """None when a layer of this shape and these specs can be stored, else the reason why not."""

    @abstractmethod
    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of what `pack` returns; `qweight` is always one of them.

        Scales are listed in the type they are saved in; in memory they may sit in a wider compute dtype.
        """

    @abstractmethod
    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """QTensor -> canonical tensors of the weight."""

    @abstractmethod
    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        """Inverse of `pack`: equal codes, scale and zero."""

    def layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`weight_layout`, and for static inputs `input_scale` (and `input_zero_point`): all a layer saves."""
        return self.weight_layout(layer) | input_layout(layer.inputs, layer.shape[1])

    def linear(
        self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer, kernel: str, around: Around = ALONE
    ) -> Tensor:
        """`y_TN = q(x) W^T` by the kernel named, or by the "reference".

        `tensors` holds the layout's names; those that the kernel replaces may be missing, it does not get them.
        `around` holds nothing but what the kernel `fuses`.
        """
        gone = self.replaces.get(kernel, ())
        named = [tensors[n] for n in sorted(tensors) if n not in gone]
        result: Tensor = self.op(x_TK, named, blob, layer.key, kernel, *around.arguments)
        return result

    def fuses(self, layer: Layer, kernel: str) -> frozenset[str]:
        """See `Fusing.fuses`; nothing for kernels that do not."""
        found = next((k for k in self.kernels if k.name == kernel), None)
        return found.fuses(layer) if isinstance(found, Fusing) else frozenset()

    def restore(self, blob: list[Tensor], layer: Layer, kernel: str) -> dict[str, Tensor]:
        """The canonical tensors that the kernel's blob replaces, to the bit."""
        gone = sorted(self.replaces.get(kernel, ()))
        return dict(zip(gone, self._restore(blob, layer.key, kernel), strict=True)) if gone else {}

    def weight(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> Tensor:
        """`W_NK`: `unpack(...).dequantize(dtype)`, and a format that overrides it for speed gives the same bits."""
        return self.unpack(tensors, layer).dequantize(dtype)

    def round_input(self, x_TK: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """The input as the product sees it, in x's type: rounded as `layer.inputs` says."""
        return fake_quantize(x_TK, layer.inputs, tensors)

    def reference(self, x_TK: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """The specification of `linear`, and what runs when no kernel fits."""
        return product(self.round_input(x_TK, tensors, layer), self.weight(tensors, layer, x_TK.dtype))

    def rows(self, ids_T: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """Rows of the weight, `[T, K]` float32 (a lookup). A format whose rows can be cut out does better than this."""
        return self.unpack(tensors, layer).dequantize()[ids_T]

    def check(self, tensors: Tensors, layer: Layer) -> str | None:
        """Validation of loaded tensors (names, shapes, types, finite scales); None when sound, else what is wrong."""
        layout = self.layout(layer)
        if set(tensors) != set(layout):
            return f"tensors {sorted(tensors)} where {sorted(layout)} are expected"
        for name, (shape, dtype) in layout.items():
            tensor = tensors[name]
            same = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
            if tuple(tensor.shape) != shape or not same:
                return f"{name} is {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} is expected"
            if tensor.is_floating_point() and not all_finite(tensor):
                return f"{name} holds NaN or infinite values"
        return check_input(layer.inputs, tensors)


_IDS: set[str] = set()


def _register(fmt: PackedFormat) -> tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]:
    """The operators of a format: `hf_quant::<id>`, its gradient `..._gradient`, `..._weight` and `..._restore`."""
    name = "hf_quant::" + fmt.id.replace("-", "_").replace("/", "_")
    kernels = {kernel.name: kernel for kernel in fmt.kernels}

    @cache
    def names(key: str, kernel: str) -> list[str]:
        gone = fmt.replaces.get(kernel, ())
        return [name for name in sorted(fmt.layout(Layer.from_key(key))) if name not in gone]

    def linear(
        x: Tensor,
        tensors: list[Tensor],
        blob: list[Tensor],
        layer: str,
        kernel: str,
        a: Tensor | None,
        up: Tensor | None,
        entry: Tensor | None,
        size: int,
        seed: int | None,
    ) -> Tensor:
        named = dict(zip(names(layer, kernel), tensors, strict=True))
        if kernel == "reference":
            return fmt.reference(x, named, Layer.from_key(layer))
        chosen = kernels[kernel]
        if a is None and entry is None and not size:
            return chosen.run(x, named, blob, Layer.from_key(layer))
        assert isinstance(chosen, Fusing)  # noqa: S101  `Around` says so
        around = Around(None if a is None or up is None else (a, up), Hadamard(size, seed) if size else None, entry)
        return chosen.fused(x, named, blob, Layer.from_key(layer), around)

    def restore(blob: list[Tensor], layer: str, kernel: str) -> list[Tensor]:
        chosen, whole = kernels[kernel], Layer.from_key(layer)
        found: Tensors = chosen.restore(blob, whole) if isinstance(chosen, Restoring) else {}
        return [found[name] for name in sorted(found)]

    def empty(blob: list[Tensor], layer: str, kernel: str) -> list[Tensor]:
        layout = fmt.layout(Layer.from_key(layer))
        of = [layout[name] for name in sorted(fmt.replaces.get(kernel, ()))]
        return [blob[0].new_empty(shape, dtype=dtype) for shape, dtype in of]

    def weight(tensors: list[Tensor], layer: str, dtype: torch.dtype) -> Tensor:
        named = dict(zip(names(layer, "reference"), tensors, strict=True))
        return fmt.weight(named, Layer.from_key(layer), dtype)

    restore_op = torch.library.custom_op(
        name + "_restore", restore, mutates_args=(), schema="(Tensor[] blob, str layer, str kernel) -> Tensor[]"
    )
    restore_op.register_fake(empty)
    weight_op = torch.library.custom_op(
        name + "_weight", weight, mutates_args=(), schema="(Tensor[] tensors, str layer, ScalarType dtype) -> Tensor"
    )
    weight_op.register_fake(lambda held, layer, dtype: held[0].new_empty(Layer.from_key(layer).shape, dtype=dtype))

    gradient_op = gradient_operator(fmt, kernels, names)

    op = torch.library.custom_op(
        name,
        linear,
        mutates_args=(),
        schema="(Tensor x, Tensor[] tensors, Tensor[] blob, str layer, str kernel, "
        "Tensor? a, Tensor? up, Tensor? entry, int size, int? seed) -> Tensor",  # defaults upset torch's autograd,
    )
    op.register_fake(lambda x, tensors, blob, layer, *_: x.new_empty(x.shape[0], Layer.from_key(layer).shape[0]))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401  torch's own signature
        _, tensors, blob, ctx.layer, ctx.kernel, a, up, _, *ctx.rotation = inputs
        ctx.save_for_backward(a, up, *tensors, *blob)
        ctx.tensors = len(tensors)

    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        a, up, *saved = ctx.saved_tensors
        tensors, blob = saved[: ctx.tensors], saved[ctx.tensors :]
        grad_TK = gradient_op(grad_TN, tensors, blob, ctx.layer, ctx.kernel)
        if ctx.rotation[0]:
            grad_TK = torch.ops.hf_quant.hadamard(grad_TK, *ctx.rotation, True)
        branch = (None, None) if a is None else (grad_TN @ up, grad_TN.T @ a)
        return grad_TK, [None] * len(tensors), [None] * len(blob), None, None, *branch, None, None, None

    op.register_autograd(backward, setup_context=save)
    return op, restore_op


@cache
def formats() -> dict[str, PackedFormat]:
    """Every format by id: those of `hf_quant.kernels` (a folder with `format.py` that defines `FORMATS`, a tuple), and
    those of installed packages (entry point group `hf_quant.formats`, such a tuple).
    """
    import hf_quant.kernels as package

    folders = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg and not m.name.startswith("_"))
    named = [f"hf_quant.kernels.{name}.format" for name in folders]  # a folder without it holds an operator
    tuples = [importlib.import_module(name).FORMATS for name in named if find_spec(name) is not None]
    return {fmt.id: fmt for fmt in chain(*tuples, *brought("hf_quant.formats", tuples_of(PackedFormat)))}


def format_named(format_id: str) -> PackedFormat:
    """The format with this id.

    Raises:
        CheckpointError: no installed version of hf-quant knows it.
    """
    try:
        return formats()[format_id]
    except KeyError:
        known = ", ".join(sorted(formats()))
        raise CheckpointError(
            f"format {format_id!r} is not known here (known: {known}); a newer hf-quant may be needed, or the package "
            f"that brings it{broken('hf_quant.formats')}"
        ) from None


def format_for(layer: Layer) -> PackedFormat:
    """The highest-priority format that holds the layer.

    Raises:
        UnsupportedSpec: none does; each reason is listed.
    """
    reasons = []
    for fmt in sorted(formats().values(), key=lambda f: (-f.priority, f.id)):
        reason = fmt.holds(layer)
        if reason is None:
            return fmt
        reasons.append(f"{fmt.id}: {reason}")
    raise UnsupportedSpec(f"no packed format holds a layer of shape {layer.shape}: " + "; ".join(reasons))


def choose_kernel(
    fmt: PackedFormat, layer: Layer, device: torch.device, dtype: torch.dtype
) -> tuple[str, dict[str, str]]:
    """(name of the kernel to run, why each earlier one refused). "reference" when none supports the layer."""
    refused: dict[str, str] = {}
    for kernel in fmt.kernels:
        reason = kernel.supports(layer, device, dtype)
        if reason is None:
            return kernel.name, refused
        refused[kernel.name] = reason
    return "reference", refused
