"""Claims: what a paper says of its method, checked and kept as JSON, from which the status page is made.

Two kinds. An *invariant* is mathematics and must hold. An *order* is an experiment: on several seeds one figure (lower
is better) lies below `factor` times another. It is reproduced when the mean does and at least two thirds of the seeds
agree; when it does not at our scale, the test says so with `reproduced=False`, and the figures are published.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
        test: the test that made it, as pytest names it.
        source: fingerprint of what that test measures (`sources.fingerprint`); empty until it has passed.
    """

    method: str
    statement: str
    kind: Literal["invariant", "order"]
    reproduced: bool
    figures: dict[str, float | list[float]] = field(default_factory=dict)
    test: str = ""
    source: str = ""

    @property
    def seeds(self) -> int:
        """On how many seeds an order was compared; 0 for an invariant."""
        ours = self.figures.get("ours")
        return len(ours) if self.kind == "order" and isinstance(ours, list) else 0


@dataclass(slots=True)
class Claims:
    """Checks claims of one test and, when it has a folder, writes each method's to `<folder>/<method>.json`."""

    folder: Path | None = None
    test: str = ""
    made: list[Claim] = field(default_factory=list)

    def invariant(
        self, method: str, statement: str, holds: bool, figures: Mapping[str, float | list[float]] | None = None
    ) -> Claim:
        """Check one that must hold.

        Raises:
            AssertionError: it does not.
        """
        kept: dict[str, float | list[float]] = {**(figures or {})}
        claim = Claim(
            method=method, statement=statement, kind="invariant", reproduced=bool(holds), figures=kept, test=self.test
        )
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
        claim = Claim(
            method=method, statement=statement, kind="order", reproduced=held, figures=figures, test=self.test
        )
        self._keep(claim)
        if held != reproduced:
            told = "is said to be reproduced and is not" if reproduced else "is said not to be reproduced and is"
            raise AssertionError(f"{method}: {statement}: {told}: {figures}")
        return claim

    def finish(self, source: str) -> None:
        """The test has passed: what it claimed is true of this source, and what it once claimed besides is gone."""
        made = {(c.method, c.statement) for c in self.made}
        for path in sorted(self.folder.glob("*.json")) if self.folder is not None else ():
            before = read(path)
            others = [c for c in before if c.test != self.test]
            mine = [c for c in before if c.test == self.test and (c.method, c.statement) in made]
            if len(others) < len(before):
                write(path, others + [replace(c, source=source) for c in mine])

    def _keep(self, claim: Claim) -> None:
        """Replace the claim with the same statement in the method's file."""
        self.made.append(claim)
        if self.folder is None:
            return
        path = self.folder / f"{claim.method}.json"
        write(path, [c for c in read(path) if c.statement != claim.statement] + [claim])


def read(path: Path) -> list[Claim]:
    """The claims in a file, none when it does not exist."""
    return [Claim(**c) for c in json.loads(path.read_text())] if path.is_file() else []


def write(path: Path, claims: Sequence[Claim]) -> None:
    """The file anew, by statement; none for no claims."""
    if not claims:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(c) for c in sorted(claims, key=lambda c: c.statement)], indent=1) + "\n")
