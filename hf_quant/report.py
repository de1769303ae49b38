"""Report: what a run did to every parameter, measured. JSON both ways; `report.html` is drawn from it."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_quant.errors import CheckpointError

Status = Literal["quantized", "kept", "unsupported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter of the original model with more than 1024 elements.

    Attributes:
        name: dotted path of the parameter in the original model.
        shape: its shape.
        status: quantized, kept (see `reason`), or unsupported.
        reason: why it was kept or is unsupported; for quantized ones a note such as "never reached by calibration".
        format: the packed format's id, for quantized ones.
        bits: everything stored for it (codes, scales, zero points, branches), in bits; for kept ones its own bytes.
        error: relative squared output error `tr(E H E^T) / tr(W H W^T)` on calibration inputs, or the relative
            squared weight error when no inputs were captured (`error_of` says which).
        error_of: "output" or "weight".
        seconds: time spent solving it.
        spec: how its weights are quantized, as `Spec.to_json()`.
        inputs: how the inputs of its layer are quantized, likewise; None when they are not.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    reason: str = ""
    format: str | None = None
    bits: int = 0
    error: float | None = None
    error_of: Literal["output", "weight"] | None = None
    seconds: float | None = None
    spec: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None

    @property
    def values(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
        method: method id and its arguments, as in `QuantConfig.to_dict()`.
        coverage: an entry for every parameter above 1024 elements.
        seconds: wall time of the run; resumed runs add up.
        peak_bytes: peak resident memory of the process.
        calibration: what was used: samples, tokens, fingerprint; empty for data-free methods.
        versions: of the libraries that took part.
        measured: `Evaluation.to_json()` when the model was evaluated, else empty.
        training: what a trainer measured (see `stages.trainer.Trained`), else empty.
    """

    method: dict[str, Any]
    coverage: tuple[Entry, ...]
    seconds: float = 0.0
    peak_bytes: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The entries that were quantized."""
        return tuple(e for e in self.coverage if e.status == "quantized")

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight: everything stored counted."""
        values = sum(e.values for e in self.quantized)
        return sum(e.bits for e in self.quantized) / values if values else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        """Inverse of `to_json`."""
        coverage = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in data["coverage"])
        return cls(**{**data, "coverage": coverage})

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read `report.json`.

        Raises:
            CheckpointError: it is missing, truncated or no report.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is not a report of a run: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `report.json`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")
