"""Budget: how large a quantized model may become, as a person says it, and what may be chosen to get there."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_quant.errors import ConfigError

WIDTHS = (2, 3, 4, 5, 6, 8)
UNITS = {"bits": None, "bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FORM = re.compile(rf"(?:fits in )?(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")
EXAMPLES = '"3.2 bits" (true bits per quantized weight), "6.5 GB", "900 MB", "120000000 bytes" (the whole model)'


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound of the size, and the widths that sites may get.

    Attributes:
        size: "3.2 bits", true bits per quantized weight with scales and all else counted; or "6.5 GB", "900 MiB",
            "120000000 bytes", the tensors of the whole model, embeddings and kept parameters counted (the header of
            a file adds some hundred bytes a tensor). "fits in 6.5 GB" is the same as "6.5 GB".
        by: id of the method whose sensitivity and search choose; None: the method's own, or else the default.
        widths: the values of the method's argument `bits` to choose from.
        fused: sites that read the same tensor (q, k, v; gate, up) get one choice: serving engines fuse them.
    """

    size: str
    by: str | None = None
    widths: tuple[int, ...] = WIDTHS
    fused: bool = True

    def __post_init__(self) -> None:
        found = FORM.fullmatch(self.size) if isinstance(self.size, str) else None
        if found is None or not float(found[1]) > 0 or (found[2] == "bits" and float(found[1]) > 16):
            raise ConfigError(f"budget={self.size!r}: a size such as {EXAMPLES}")
        widths = tuple(self.widths) if isinstance(self.widths, list | tuple) else ()
        object.__setattr__(self, "widths", widths)  # JSON hands us a list
        if not widths or any(type(w) is not int for w in widths) or list(widths) != sorted(set(widths)):
            raise ConfigError(f"budget widths={self.widths!r}: ascending integers, such as {list(WIDTHS)}")
        if not isinstance(self.fused, bool) or not isinstance(self.by, str | None):
            raise ConfigError(f"budget fused={self.fused!r}, by={self.by!r}: true or false, and the id of a method")

    @classmethod
    def read(cls, given: "str | Mapping[str, Any] | Budget") -> "Budget":
        """From what a user or JSON says: a size, or a mapping of this class's fields.

        Raises:
            ConfigError: a size nobody can read, or an unknown field.
        """
        if isinstance(given, Budget):
            return given
        if not isinstance(given, Mapping):
            return cls(given)
        known = [f.name for f in fields(cls)]
        if "size" not in given or not set(given) <= set(known):
            raise ConfigError(f"budget={dict(given)}: a mapping with size, and of {known[1:]} what differs")
        return cls(**given)

    @property
    def bits(self) -> float | None:
        """Average true bits per quantized weight; None for a budget in bytes."""
        number, unit = self._parts
        return number if UNITS[unit] is None else None

    @property
    def bytes(self) -> int | None:
        """Bytes of the whole model; None for a budget in bits."""
        number, unit = self._parts
        size = UNITS[unit]
        return None if size is None else math.floor(number * size)

    @property
    def _parts(self) -> tuple[float, str]:
        found = FORM.fullmatch(self.size)
        assert found is not None  # noqa: S101  __post_init__ has checked it
        return float(found[1]), found[2]

    def to_json(self) -> str | dict[str, Any]:
        """The size alone when all else is the default; `read` is its inverse."""
        default = asdict(Budget(self.size))
        changed = {k: v for k, v in asdict(self).items() if v != default[k]}
        if not changed:
            return self.size
        return {"size": self.size} | {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
