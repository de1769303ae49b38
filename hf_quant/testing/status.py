"""The status page: every method of the catalogue, and whether its claims were reproduced, from what tests kept.

    python -m hf_quant.testing.status                 write STATUS.md
    python -m hf_quant.testing.status --check         exit 1 when it is not what the kept claims give

`proof/catalogue.json` lists the methods that exist, built or not. `proof/claims/<method>.json` is written by
`pytest --claims`. Nothing on the page is written by hand.
"""

import ast
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hf_quant.method import Method, list_methods
from hf_quant.testing.claims import Claim, read, write

PROOF = Path(__file__).parents[2] / "proof"
PAGE = PROOF.parent / "STATUS.md"
SEEDS = 3  # of an order


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A method of the literature.

    Attributes:
        id: its name here.
        title: of the paper, in short.
        arxiv: the paper's number, where it is known.
        claim: what the paper says, in our words.
        registered_as: further ids under which it, or a variant of it, is registered.
    """

    id: str
    title: str
    arxiv: str | None
    claim: str
    registered_as: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Every id that counts as this method."""
        return (self.id, *self.registered_as)


def catalogue(proof: Path = PROOF) -> dict[str, list[Known]]:
    """Section -> methods."""
    sections = json.loads((proof / "catalogue.json").read_text())
    return {
        s["section"]: [Known(**{**m, "registered_as": tuple(m.get("registered_as", ()))}) for m in s["methods"]]
        for s in sections
    }


def kept_claims(proof: Path = PROOF) -> dict[str, list[Claim]]:
    """Method id -> the claims that tests kept."""
    files = sorted((proof / "claims").glob("*.json"))
    return {path.stem: read(path) for path in files}


def drop_orphans(proof: Path = PROOF) -> list[str]:
    """Remove kept claims whose method or test is gone; returns which."""
    methods, dropped = {m.id for m in list_methods()}, []
    for path in sorted((proof / "claims").glob("*.json")):
        kept = read(path)
        mine = [c for c in kept if path.stem in methods and _test_exists(c.test, proof.parent)]
        dropped += [f"{c.method}: {c.statement}" for c in kept if c not in mine]
        if len(mine) < len(kept):
            write(path, mine)
    return dropped


def _test_exists(test: str, root: Path) -> bool:
    """Whether a file still has the test of this name; a claim that does not name its test is given credit."""
    file, _, name = test.partition("::")
    function = name.partition("[")[0].rpartition("::")[2]
    return not test or ((root / file).is_file() and f"def {function}(" in (root / file).read_text())


def unmeasured(proof: Path = PROOF) -> list[str]:
    """The tests of claims of which nothing is kept, as pytest names them: `make proof` has not come to them yet."""
    kept = {c.test.partition("[")[0] for claims in kept_claims(proof).values() for c in claims}
    found = []
    for path in sorted((proof.parent / "plugins").rglob("*_test.py")):
        file = path.relative_to(proof.parent).as_posix()
        tests = [n for n in ast.parse(path.read_text(), file).body if isinstance(n, ast.FunctionDef)]
        found += [
            f"{file}::{test.name}"
            for test in tests
            if test.name.startswith("test_") and any(a.arg == "claims" for a in test.args.args)
        ]
    return [test for test in found if test not in kept]


def page(
    sections: Mapping[str, Sequence[Known]],
    claims: Mapping[str, Sequence[Claim]],
    methods: Iterable[Method],
    waiting: Sequence[str] = (),
) -> str:
    """The page as Markdown; `waiting` are tests of claims that were never measured."""
    registered = {m.id: m for m in methods}
    listed = {i for known in sections.values() for k in known for i in k.ids}
    others = [Known(id=m.id, title=m.paper.title, arxiv=m.paper.arxiv, claim=m.claim) for m in registered.values()]
    others = [k for k in others if k.id not in listed]
    every = {**sections, **({"Registered beside the catalogue": others} if others else {})}
    verdicts = [_verdict(k, claims, registered)[0] for known in every.values() for k in known]
    counts = {name: verdicts.count(name) for name in dict.fromkeys(verdicts)}
    lines = [
        "# Status",
        "",
        "Which published methods are built, and whether their claims come out on our bench of small trained models.",
        "Made by `make proof` from [proof](proof); nothing here is written by hand. An *invariant* is mathematics and",
        "must hold; an *order* compares two figures on several seeds and is reproduced when the mean and two thirds of",
        f"the seeds agree. Fewer than {SEEDS} seeds are bold: nothing is drawn there, or a claim is kept in short.",
        "What fails at this scale is said to fail, with its figures.",
        "",
        "| " + " | ".join(counts) + " | all |",
        "|" + "---:|" * (len(counts) + 1),
        "| " + " | ".join(map(str, counts.values())) + f" | {len(verdicts)} |",
    ]
    for section, known in every.items():
        lines += ["", f"## {section}", "", "| method | paper | the paper's claim | status |", "|---|---|---|---|"]
        lines += [_row(k, claims, registered) for k in known]
    lines += ["", "## What was checked", ""]
    lines += [
        "| method | statement | kind | came out | seeds | ours | theirs | ratio | asked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_checked(claim) for method in sorted(claims) for claim in claims[method]]
    if waiting:
        lines += [
            "",
            "## Not measured yet",
            "",
            "Tests of claims of which nothing is kept; nothing above counts them.",
            "",
        ]
        lines += [f"- `{test}`" for test in waiting]
    return "\n".join(lines) + "\n"


def _verdict(known: Known, claims: Mapping[str, Sequence[Claim]], registered: Mapping[str, Method]) -> tuple[str, str]:
    """(status, status with its counts)."""
    built = [i for i in known.ids if i in registered]
    if not built:
        return "not built", "not built"
    checked = [c for i in built for c in claims.get(i, ())]
    if not checked:
        return "not checked", "built, no claim kept"
    held = sum(c.reproduced for c in checked)
    names = "" if built == [known.id] else ", as " + ", ".join(f"`{i}`" for i in built)
    if held == len(checked):
        return "reproduced", f"reproduced ({held} of {len(checked)}{names})"
    return "not reproduced at this scale", f"**not reproduced at this scale** ({held} of {len(checked)} hold{names})"


def _row(known: Known, claims: Mapping[str, Sequence[Claim]], registered: Mapping[str, Method]) -> str:
    papers = [registered[i].paper.arxiv for i in known.ids if i in registered]
    arxiv = next((p for p in papers if p), known.arxiv)
    title = f"[{_cell(known.title)}](https://arxiv.org/abs/{arxiv})" if arxiv else _cell(known.title)
    variants = "".join(f" `{i}`" for i in known.registered_as)
    name = f"`{known.id}`" + (f" (+{variants})" if variants else "")
    return f"| {name} | {title} | {_cell(known.claim)} | {_verdict(known, claims, registered)[1]} |"


def _checked(claim: Claim) -> str:
    figures = claim.figures
    numbers = ["", "", "", ""]
    if claim.kind == "order":
        numbers = [
            _mean(figures["ours"]),
            _mean(figures["theirs"]),
            f"{figures['ratio']:.3f}",
            f"<= {figures['factor']:g}",
        ]
    elif figures:
        numbers[0] = ", ".join(f"{_cell(name)} {_mean(value)}" for name, value in figures.items())
    result = "yes" if claim.reproduced else "**no**"
    seeds = "" if claim.kind == "invariant" else str(claim.seeds) if claim.seeds >= SEEDS else f"**{claim.seeds}**"
    return "| " + " | ".join([f"`{claim.method}`", _cell(claim.statement), claim.kind, result, seeds, *numbers]) + " |"


def _mean(value: float | list[float]) -> str:
    return f"{fmean(value) if isinstance(value, list) else value:.4g}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def current() -> str:
    """The page that the kept claims and the registry give now."""
    return page(catalogue(), kept_claims(), list_methods(), unmeasured())


if __name__ == "__main__":
    if "--check" not in sys.argv:
        for claim in drop_orphans():
            print(f"dropped, for its method or its test is gone: {claim}")  # noqa: T201
        PAGE.write_text(current())
    elif not PAGE.is_file() or PAGE.read_text() != current():
        sys.exit("STATUS.md is not what proof/claims gives; run: make proof")
