"""Spec: how ONE tensor is quantized. A value, with JSON both ways."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from hf_quant.errors import ConfigError
from hf_quant.grids import FloatGrid, Grid, IntGrid, grid_from_json, grid_to_json
from hf_quant.hadamard import Hadamard

Index = Literal["none", "token", "timestep", "position", "prompt", "cfg_branch", "modality", "expert"]
Zero = Literal["none", "int", "float"]
When = Literal["static", "dynamic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How one tensor is quantized: `value = (grid.decode(code) - zero) * scale [* tensor_scale]`.

    Attributes:
        grid: the representable values before scaling.
        block: values sharing one scale, `(rows, columns)`; -1 means the whole axis. Weights are `[N, K]`, so
            `(1, 128)` is group-wise, `(1, -1)` per output channel, `(-1, -1)` per tensor. Activations are `[T, K]`,
            so `(1, -1)` is per token.
        index: what the scale depends on besides the block; anything but "none" and "token" is a table.
        entries: rows of that table; its tensors are `[entries, 1]`. 1 when there is no table.
        scale: the grid on which scales are stored.
        zero: zero point: none, an integer on the grid, or a float.
        range: static (stored) or dynamic (computed from the tensor at run time).
        tensor_scale: one more float32 scale, for the whole tensor (NVFP4), so that the others fit their grid.
        rotation: values are those of the rotated rows of a weight (HIGGS): reading it rotates back.
        power: of a dynamic token's largest magnitude in its scale. Below 1, every column has a stored scale besides:
            `scale_tk = max_k |x_tk|^power column_k / top`.
    """

    grid: Grid
    block: tuple[int, int] = (1, -1)
    index: Index = "none"
    entries: int = 1
    scale: Grid = FloatGrid("bfloat16")
    zero: Zero = "none"
    range: When = "static"
    tensor_scale: bool = False
    rotation: Hadamard | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # JSON hands us a list
        if len(self.block) != 2 or any(b != -1 and b < 1 for b in self.block):
            raise ConfigError(f"block={self.block}: two sizes, each positive or -1 for the whole axis")
        for name, value, allowed in (
            ("index", self.index, get_args(Index)),
            ("zero", self.zero, get_args(Zero)),
            ("range", self.range, get_args(When)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: one of {list(allowed)}")
        if not 0 <= self.power <= 1 or (self.power != 1 and (self.range, self.zero) != ("dynamic", "none")):
            raise ConfigError(f"power={self.power!r}: from 0 to 1, below 1 only for symmetric dynamic activations")
        if not isinstance(self.entries, int) or self.entries < 1:
            raise ConfigError(f"entries={self.entries!r}: a table has at least one row")
        if self.entries > 1 and (self.index in ("none", "token") or self.range == "dynamic"):
            raise ConfigError(f"entries={self.entries}: only a static range indexed by more than the token is a table")

        if (self.tensor_scale or self.rotation) and (
            self.range == "dynamic" or self.index != "none" or self.zero == "float"
        ):
            raise ConfigError(
                "a tensor scale or a rotation goes with static scales of a weight, no index, no float zero points"
            )

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale tensor for a tensor of `shape`: the last block of an axis may be ragged."""
        rows, columns = self.block_size(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def block_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a whole block of a tensor of `shape`, which may hold no rows."""
        rows, columns = (max(1, size if b == -1 else min(b, size)) for b, size in zip(self.block, shape, strict=True))
        return rows, columns

    @property
    def stored(self) -> bool:
        """Whether an activation of this spec needs something of calibration: its range, or its columns' scales."""
        return self.range == "static" or self.power != 1

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict; `from_json` is its inverse. What most specs do not have is left out when they have not."""
        rare: dict[str, Any] = {"tensor_scale": True} if self.tensor_scale else {}
        rare |= {"rotation": self.rotation.to_json()} if self.rotation else {}
        rare |= {"power": self.power} if self.power != 1 else {}
        return {
            "grid": grid_to_json(self.grid),
            "block": list(self.block),
            "index": self.index,
            "entries": self.entries,
            "scale": grid_to_json(self.scale),
            "zero": self.zero,
            "range": self.range,
            **rare,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Spec":
        """Inverse of `to_json`; an unknown field is a `ConfigError`."""
        known = {"grid", "block", "index", "entries", "scale", "zero", "range"}
        rare = {"tensor_scale", "rotation", "power"}
        if not isinstance(data, dict) or set(data) - rare != known:
            raise ConfigError(f"a spec has exactly the fields {sorted(known)}, got {data!r}")
        fields = {**data, "grid": grid_from_json(data["grid"]), "scale": grid_from_json(data["scale"])}
        if "rotation" in data:
            fields["rotation"] = Hadamard.from_json(data["rotation"])
        return cls(**fields)

    @property
    def outer(self) -> bool:
        """Whether there is a tensor scale or a rotation, which not every format holds."""
        return self.tensor_scale or self.rotation is not None


def check_group_size(group_size: int) -> None:
    """Raises `ConfigError` for what is no number of weights along K, nor -1."""
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ConfigError(f"group_size={group_size!r}: a positive integer, or -1 for one scale per output channel")


def int_spec(bits: int, group_size: int = -1, *, symmetric: bool = False, scale: str = "bfloat16") -> Spec:
    """Integer weights in groups of `group_size` along K (-1: per output channel)."""
    check_group_size(group_size)
    return Spec(
        grid=IntGrid(bits, signed=symmetric),
        block=(1, group_size),
        zero="none" if symmetric else "int",
        scale=FloatGrid(scale),
    )


def act_spec(bits: int = 8, *, static: bool = False, symmetric: bool = True) -> Spec:
    """Integer activations: per-token dynamic, or per-tensor static."""
    return Spec(
        grid=IntGrid(bits, signed=symmetric),
        block=(-1, -1) if static else (1, -1),
        index="none" if static else "token",
        scale=FloatGrid("float32"),
        zero="none" if symmetric else "int",
        range="static" if static else "dynamic",
    )


def cross_spec(bits: int = 8, power: float = 0.15) -> Spec:
    """Integer activations whose scale depends on the token, to this power, and on the column."""
    return replace(act_spec(bits), power=power)
