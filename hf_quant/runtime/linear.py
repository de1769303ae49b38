"""QuantLinear: a linear layer that runs from packed weights. One class; what a method adds are fields of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.formats import Around, Layer, PackedFormat, choose_kernel
from hf_quant.hadamard import Hadamard
from hf_quant.operators import need_operator
from hf_quant.qtensor import QTensor
from hf_quant.runtime import described
from hf_quant.runtime.activation import pack_input, round_by_entry, timed
from hf_quant.runtime.branches import (
    Branch,
    CodedLowRank,
    Constant,
    Sparse,
    factor_layers,
    merged,
    sparse_linear,
)
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.layouts import expect
from hf_quant.runtime.packed import frozen, local
from hf_quant.runtime.terms import SPARSE, WithTerms
from hf_quant.sites import Kind
from hf_quant.spec import Spec


class QuantLinear(WithTerms, nn.Linear):
    """`y = q(z + t) Q^T + (z down^T) up^T + z S^T + o + b` with `z = (s x) R`, and Q packed `[N, K]`.

    `s` (`pre_scale` `[K]`), the rotation R, `t` (`shift` `[K]`), the low-rank branch (`lr_down` `[R, K]`, `lr_up`
    `[N, R]`; in 8 or 4 bits, the tensors of `branches.CodedLowRank`), the sparse one (`sparse_*`, the tensors of
    `branches.Sparse`), `o` (`offset` `[N]`, which takes `Q t` out again) and `b` are there only when needed. A static
    input range lies beside the codes as `input_scale` (and `input_zero_point`), `[entries]`; where it is a table by
    timestep, `clock` tells which entry a sample reads.
    The logical weight is `(Q + up down + S) R^T diag(s)`.
    """

    kind: Kind
    clock: Clock | None
    _fuses: frozenset[str] = frozenset()  # what of `Around` the chosen kernel takes on

    def __init__(
        self,
        fmt: PackedFormat,
        layer: Layer,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype,
        kind: Kind = "linear",
        bias: Tensor | None = None,
        pre_scale: Tensor | None = None,
        lr_down: Tensor | None = None,
        lr_up: Tensor | None = None,
        coded: tuple[dict[str, Layer], dict[str, Tensor]] | None = None,
        sparse: Sparse | None = None,
        rotation: Hadamard | None = None,
        shift: Tensor | None = None,
        offset: Tensor | None = None,
        clock: Clock | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = layer.shape
        self.kind, self.rotation, self.clock = kind, rotation, clock
        if rotation is not None:
            need_operator("hadamard")
        self._hold(fmt, layer, tensors, dtype)
        self._rounded_before = replace(layer, inputs=None) if timed(layer.inputs) else layer
        for name, part in zip(SPARSE, (None,) * 3 if sparse is None else sparse.tensors, strict=True):
            self.register_parameter(name, None if part is None else frozen(part))
        self.factors, codes = coded or ({}, {})
        extras = {"pre_scale": pre_scale, "shift": shift, "lr_down": lr_down, "lr_up": lr_up, "offset": offset}
        for name, tensor in {**extras, **codes, "bias": bias}.items():
            self.register_parameter(name, None if tensor is None else frozen(tensor))

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        fmt: PackedFormat,
        *,
        kind: Kind = "linear",
        bias: Tensor | None = None,
        inputs: Spec | None = None,
        input_range: tuple[Tensor, Tensor | None] | None = None,
        pre_scale: Tensor | None = None,
        branches: Sequence[Branch] = (),
        rotation: Hadamard | None = None,
        shift: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantLinear":
        """A ready layer from what a solver returned.

        Args:
            q: the weight.
            fmt: a format that holds it.
            kind: what `dequantize_model` puts back: nn.Linear, or GPT-2's Conv1D, which stores the matrix transposed.
            bias: `[N]`; an existing Parameter is kept as it is.
            inputs: how activations are quantized, or None.
            input_range: (scale, zero) of a static `inputs`, as `qtensor.from_extremes` gives them.
            pre_scale: `[K]`, multiplied into the input at run time (a smoothing that could not be folded away).
            branches: low-rank and sparse terms, and constants; several of a kind become one.
            rotation: of the input, while the model runs; `q` and the branches are those of the rotated weight `W R`.
            shift: `[K]`, added to the (rotated) input before it is rounded; what it does to the output is taken out.
            dtype: compute dtype.
        """
        layer = Layer(q.shape, q.spec, inputs)
        tensors = fmt.pack(q) | (pack_input(*input_range) if input_range is not None else {})
        low, sparse = merged(branches)
        down = up = coded = None
        if isinstance(low, CodedLowRank):
            codes = {n: t.to(dtype) if t.is_floating_point() else t for n, t in low.named.items()}
            coded = factor_layers(q.shape, low.down.shape[0], low.down.spec), codes
        elif low is not None:
            down, up = (f.to(dtype, copy=True).contiguous() for f in (low.down_RK, low.up_NR))  # one a layer
        sparse = None if sparse is None else replace(sparse, values=sparse.values.to(dtype))
        scale = None if pre_scale is None else pre_scale.to(dtype)
        constants = [b.b_N.float() for b in branches if isinstance(b, Constant)]
        if shift is not None:
            shift = shift.detach().to(dtype, copy=True)  # layers that share an input have one each
            constants.append(-(q.dequantize() @ shift.float()))
        offset = torch.stack(constants).sum(0).to(dtype) if constants else None
        module = cls(
            fmt,
            layer,
            tensors,
            dtype=dtype,
            kind=kind,
            bias=bias,
            pre_scale=scale,
            lr_down=down,
            lr_up=up,
            coded=coded,
            sparse=sparse,
            rotation=rotation,
            shift=shift,
            offset=offset,
        )
        module.prepare()
        return module

    def describe(self) -> dict[str, Any]:
        """All that `from_json` needs besides shape and bias, JSON-safe."""
        return described.describe(self)

    @classmethod
    def from_json(
        cls, data: dict[str, Any], shape: tuple[int, int], *, kind: Kind, bias: bool, dtype: torch.dtype
    ) -> "QuantLinear":
        """An empty layer on the meta device with the shapes and types of a saved one.

        Raises:
            CheckpointError: a format that is not known here.
            ConfigError: a spec or rank that is not valid.
        """
        return described.empty(cls, data, shape, kind=kind, bias=bias, dtype=dtype)

    @torch.no_grad()
    def prepare(self) -> None:
        """Choose the kernel for this device and compute dtype; nothing on the meta device. See `lay_out`."""
        self._unprepare()
        device = local(self.qweight).device
        if device.type == "meta":
            return
        self._settle()
        self._choose(device)
        if self.kernel != "reference":
            self._blob = None
            expect(self)
        self._ready = (device, self.compute_dtype)

    def _choose(self, device: torch.device) -> None:
        """The kernel, and what it takes on besides the product: a table of input ranges where it can, too."""
        whole = self.local_layer()
        self.kernel, self.refused = choose_kernel(self.format, whole, device, self.compute_dtype)
        self._fuses = self.format.fuses(whole, self.kernel)
        if timed(whole.inputs) and "entry_T" not in self._fuses:
            layer = self._product()
            self.kernel, self.refused = choose_kernel(self.format, layer, device, self.compute_dtype)
            self._fuses = self.format.fuses(layer, self.kernel)

    def lay_out(self) -> None:
        """Make what the chosen kernel needs of the canonical tensors: at the first forward, or before a compilation.

        What the layout holds is not kept beside it (`Restoring`), so a layer has its codes once.
        """
        if self._blob is None and self._ready is not None:
            layer = self._product(self._fuses)
            chosen = next(k for k in self.format.kernels if k.name == self.kernel)
            with torch.inference_mode(False), torch.no_grad():  # what lasts must be usable in training
                self._blob = chosen.prepare(self._operands(self._fuses), layer, self.compute_dtype)
                self._let_go(layer)

    def laid_out(self) -> tuple[list[Tensor], Layer]:
        """(what the chosen kernel made of the canonical tensors, the layer as it sees it)."""
        self.lay_out()
        return self._blob or [], self._product(self._fuses)

    @property
    def fused(self) -> frozenset[str]:
        """Names of what this layer has of `Around` and its kernel takes on."""
        extras = self.rank or self.sparse_values is not None or self.shift is not None
        has = {
            "low_rank": self.rank,
            "rotation": self.rotation is not None and not extras,  # those read the rotated input as well
            "entry_T": timed(self.layer.inputs),
        }
        return frozenset(name for name in self._fuses if has[name])

    def _product(self, fuses: frozenset[str] = frozenset()) -> Layer:
        """The layer as operator and kernel see it: without inputs that are rounded before."""
        layer = self.local_layer()
        if not timed(layer.inputs) or "entry_T" in fuses:
            return layer
        return self._rounded_before if layer is self.layer else replace(layer, inputs=None)

    def _operands(self, fuses: frozenset[str], without: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The canonical tensors of `_product`."""
        tensors = self.packed_tensors(without)
        if not timed(self.layer.inputs) or "entry_T" in fuses:
            return tensors
        return {n: t for n, t in tensors.items() if not n.startswith("input_")}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the type of x (of autocast, where it is on)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x.dtype)
        ready = self._ready == (x.device, x.dtype)  # not after an offload hook or an upcast: then the reference runs
        if self._blob is None and not torch.compiler.is_compiling():
            self.lay_out()
        blob, kernel = (self._blob, self.kernel) if ready and self._blob is not None else ([], "reference")
        fuses = self.fused if kernel != "reference" else frozenset()
        low, sparse, entry_T, rotation = self.low_rank(x.dtype), self.sparse, None, None
        if "rotation" in fuses:
            rotation = self.rotation
        else:
            x = self._rotate(x)
        z = x if self.shift is None else x + self.shift.to(x.dtype)
        z_TK, branch = z.reshape(-1, x.shape[-1]), None
        if low is not None and "low_rank" in fuses:
            branch, low = (F.linear(x.reshape(-1, x.shape[-1]), low[0]), low[1]), None
        if (inputs := self.layer.inputs) is not None and timed(inputs):
            if self.clock is None:
                raise ConfigError("a layer with input ranges by timestep has no clock to read")
            entry_T = self.clock.by_token(len(z_TK), z.device)
        if inputs is not None and entry_T is not None and "entry_T" not in fuses:
            ranges = {name: local(getattr(self, name)) for name in self._names if name.startswith("input_")}
            z_TK, entry_T = round_by_entry(z_TK, inputs, ranges, entry_T), None
        tensors = self._operands(fuses, without=self.format.replaces.get(kernel, ()))
        y = self.format.linear(z_TK, tensors, blob, self._product(fuses), kernel, Around(branch, rotation, entry_T))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if low is not None:
            y = y + F.linear(F.linear(x, low[0]), low[1])
        if sparse is not None:
            y = y + sparse_linear(x.reshape(-1, x.shape[-1]), *sparse.tensors).reshape(y.shape)
        if self.offset is not None:
            y = y + self.offset.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        rank = f", rank={self.rank}" if self.rank else ""
        sparse = "" if self.sparse_columns is None else f", sparse={len(self.sparse_columns)}"
        rotation = "" if self.rotation is None else f", rotation={self.rotation.size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format.id}, kernel={self.kernel}{rank}{sparse}{rotation}"
        )
