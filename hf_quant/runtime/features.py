"""FeatureTable: a layer whose output depends on the timestep (and class) alone, stored instead of computed.

    y_b = (1 - w_b) V[low_b, c_b] + w_b V[high_b, c_b],    t_b = (1 - w_b) steps[low_b] + w_b steps[high_b]

V is an ordinary packed matrix `[T C, N]`, a row for each timestep and class; between timesteps it is linear, beyond
the first and last it is theirs. What led to such layers alone is gone: `Vacant` stands there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer, PackedFormat, format_named
from hf_quant.qtensor import QTensor
from hf_quant.runtime.clock import Clock
from hf_quant.runtime.embedding import rows_of
from hf_quant.runtime.packed import Packed
from hf_quant.spec import Spec


class FeatureTable(Packed):
    """See the module.

    Attributes:
        clock: tells timesteps and classes; has those of the rows.
        own: entries at which the layer itself computes (`inner`), where the table would be worse.
    """

    clock: Clock

    def __init__(
        self,
        fmt: PackedFormat,
        layer: Layer,
        tensors: dict[str, Tensor],
        *,
        clock: Clock,
        own: tuple[int, ...] = (),
        inner: nn.Module | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._hold(fmt, layer, tensors, dtype)
        self.clock, self.own, self.inner = clock, own, inner

    @classmethod
    def from_qtensor(
        cls,
        V: QTensor,
        fmt: PackedFormat,
        *,
        clock: Clock,
        own: tuple[int, ...] = (),
        inner: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "FeatureTable":
        """A ready table; `inner` is the layer, where some entries are its own."""
        made = cls(fmt, Layer(V.shape, V.spec), fmt.pack(V), clock=clock, own=own, inner=inner, dtype=dtype)
        made.prepare()
        return made

    def describe(self) -> dict[str, Any]:
        """All that `from_json` needs besides the layer, JSON-safe."""
        return {
            "format": self.format.id,
            "weights": self.layer.weights.to_json(),
            "steps": list(self.clock.steps),
            "classes": list(self.clock.classes),
            "own": list(self.own),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], outputs: int, *, inner: nn.Module, dtype: torch.dtype) -> "FeatureTable":
        """An empty table on the meta device, to take the place of a layer with so many outputs.

        Raises:
            ConfigError: what is described cannot be a table.
        """
        clock = Clock(data["steps"], data["classes"])
        rows, own = len(clock.steps) * max(1, len(clock.classes)), data["own"]
        if own != sorted({e for e in own if type(e) is int and 0 <= e < len(clock.steps)}):
            raise ConfigError(f"own={own!r}: entries of a table of {len(clock.steps)} timesteps, ascending")
        fmt, layer = format_named(data["format"]), Layer((rows, outputs), Spec.from_json(data["weights"]))
        tensors = {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in fmt.layout(layer).items()}
        return cls(fmt, layer, tensors, clock=clock, own=tuple(own), inner=inner if own else None, dtype=dtype)

    def prepare(self) -> None:
        """A lookup has no kernel to choose."""
        self._unprepare()
        self.kernel = "lookup"
        if not self.qweight.is_meta:
            self._settle()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]`; of x only the shape is looked at, unless an entry is the layer's own."""
        low_B, high_B, share_B = self.clock.between()
        if (class_B := self.clock.class_row()) is not None:
            classes = len(self.clock.classes)
            low_B, high_B = low_B * classes + class_B, high_B * classes + class_B
        low_BN, high_BN = rows_of(self, torch.cat([low_B, high_B]).to(self.qweight.device)).chunk(2)
        y_BN = torch.lerp(low_BN, high_BN, share_B.to(low_BN)[:, None])
        tokens = x.shape[:-1].numel()
        y = self.clock.spread(y_BN, tokens, x.device).reshape(*x.shape[:-1], y_BN.shape[-1])
        if self.inner is None or self.clock.entry_B is None:
            return y
        own_B = torch.isin(self.clock.entry_B, torch.tensor(self.own, device=self.clock.entry_B.device))
        mine = self.clock.spread(own_B, tokens, x.device).reshape(*x.shape[:-1], 1)
        return torch.where(mine, self.inner(x).to(y.dtype), y)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        (rows, n), steps = self.layer.shape, len(self.clock.steps)
        return f"{steps} timesteps x {rows // steps} classes, {n}, format={self.format.id}, own={list(self.own)}"


class Vacant(nn.Module):
    """Where a layer was that nobody needs any more. It puts out NaN: whoever reads it after all will show."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def describe(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]`, or ids `[...]`, `-> [..., outputs]`, without memory of its own."""
        vectors = x.is_floating_point()
        nan = torch.full((), torch.nan, dtype=x.dtype if vectors else torch.get_default_dtype(), device=x.device)
        return nan.expand(*(x.shape[:-1] if vectors else x.shape), self.outputs)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.outputs}"
