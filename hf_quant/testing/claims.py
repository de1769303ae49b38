"""Claims: what a paper says of its method, checked and kept as JSON, from which the status page is made.

Two kinds. An *invariant* is mathematics and must hold. An *order* is an experiment: on several seeds one figure (lower
is better) lies below `factor` times another. It is reproduced when the mean does and at least two thirds of the seeds
agree; when it does not at our scale, the test says so with `reproduced=False`, and the figures are published.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One checked claim.

    Attributes:
        method: id of the method.
        statement: one sentence, with its setting (bits, group size, model).
        kind: see the module.
        reproduced: whether it held.
        figures: what was measured, by name; lists have one entry a seed.
    """

    method: str
    statement: str
    kind: Literal["invariant", "order"]
    reproduced: bool
    figures: dict[str, float | list[float]] = field(default_factory=dict)


@dataclass(slots=True)
class Claims:
    """Checks claims and, when it has a folder, writes each method's to `<folder>/<method>.json`."""

    folder: Path | None = None

    def invariant(
        self, method: str, statement: str, holds: bool, figures: Mapping[str, float | list[float]] | None = None
    ) -> Claim:
        """Check one that must hold.

        Raises:
            AssertionError: it does not.
        """
        kept: dict[str, float | list[float]] = {**(figures or {})}
        claim = Claim(method=method, statement=statement, kind="invariant", reproduced=bool(holds), figures=kept)
        self._keep(claim)
        if not claim.reproduced:
            raise AssertionError(f"{method}: {statement}: {kept}")
        return claim

    def order(
        self,
        method: str,
        statement: str,
        *,
        ours: Sequence[float],
        theirs: Sequence[float],
        factor: float = 1.0,
        reproduced: bool = True,
    ) -> Claim:
        """Check `ours <= factor * theirs`, seed by seed and on the mean.

        Args:
            method: id of the method.
            statement: what is compared, in one sentence.
            ours: a figure a seed, lower is better.
            theirs: the baseline's, in the same order.
            factor: how far below.
            reproduced: what is known to come out; False publishes a claim that fails at our scale.

        Raises:
            AssertionError: it came out the other way.
        """
        pairs = list(zip(ours, theirs, strict=True))
        agree = sum(a <= factor * b for a, b in pairs)
        held = sum(ours) <= factor * sum(theirs) and 3 * agree >= 2 * len(pairs)
        figures: dict[str, float | list[float]] = {
            "ours": [float(a) for a in ours],
            "theirs": [float(b) for b in theirs],
            "factor": factor,
            "ratio": sum(ours) / sum(theirs) if sum(theirs) else float("nan"),
        }
        claim = Claim(method=method, statement=statement, kind="order", reproduced=held, figures=figures)
        self._keep(claim)
        if held != reproduced:
            told = "is said to be reproduced and is not" if reproduced else "is said not to be reproduced and is"
            raise AssertionError(f"{method}: {statement}: {told}: {figures}")
        return claim

    def _keep(self, claim: Claim) -> None:
        """Replace the claim with the same statement in the method's file."""
        if self.folder is None:
            return
        path = self.folder / f"{claim.method}.json"
        kept = json.loads(path.read_text()) if path.is_file() else []
        kept = [c for c in kept if c["statement"] != claim.statement] + [asdict(claim)]
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sorted(kept, key=lambda c: str(c["statement"])), indent=1) + "\n")
