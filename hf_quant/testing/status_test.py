"""The page says what was kept, no more; and the committed one is the one that the kept claims give."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_quant.method import Paper, list_methods
from hf_quant.testing import Claims
from hf_quant.testing.status import PAGE, Known, catalogue, current, drop_orphans, kept_claims, page, unmeasured


@dataclass(frozen=True)
class Named:
    """As much of a method as the page looks at."""

    id: str
    paper: Paper = Paper("2210.17323", "A paper")
    claim: str = "It is better."


def known(name: str, *others: str) -> Known:
    return Known(id=name, title=name, arxiv=None, claim=f"{name} is good", registered_as=others)


def row(text: str, method: str) -> str:
    """The line of a method in the first tables."""
    (line,) = [x for x in text.split("## What was checked")[0].splitlines() if x.startswith(f"| `{method}` ")]
    return line


@pytest.fixture
def text() -> str:
    claims, kept = Claims(), {}
    kept["good"] = [
        claims.order("good", "lower | better", ours=[1, 1], theirs=[2, 4]),
        claims.invariant("good", "x", True),
    ]
    kept["bad"] = [
        claims.invariant("bad", "nothing is lost", True, {"lost": 0.0}),
        claims.order("bad", "lower", ours=[3.0], theirs=[2.0], reproduced=False),
    ]
    kept["variant"] = [claims.order("variant", "lower", ours=[1.0], theirs=[2.0])]
    sections = {
        "One": [known("good"), known("bad"), known("absent")],
        "Two": [known("parent", "variant", "unbuilt"), known("mute")],
    }
    methods = [Named(i) for i in ("good", "bad", "variant", "mute", "unlisted")]
    return page(sections, kept, methods)  # type: ignore[arg-type]


def test_every_method_is_listed_with_what_came_out(text: str) -> None:
    assert "| reproduced (2 of 2) |" in row(text, "good")
    assert "**not reproduced at this scale** (1 of 2 hold)" in row(text, "bad")
    assert "| not built |" in row(text, "absent")
    assert "reproduced (1 of 1, as `variant`)" in row(text, "parent")
    assert row(text, "parent").startswith("| `parent` (+ `variant` `unbuilt`) |"), "variants too are listed"
    assert "built, no claim kept" in row(text, "mute")
    assert "built, no claim kept" in row(text.split("## Registered beside the catalogue")[1], "unlisted")
    assert "| reproduced | not reproduced at this scale | not built | not checked | all |" in text
    assert "| 2 | 1 | 1 | 2 | 6 |" in text


def test_figures_are_shown_and_cells_are_escaped(text: str) -> None:
    assert "| `good` | lower \\| better | order | yes | **2** | 1 | 3 | 0.333 | <= 1 |" in text
    assert "| `bad` | lower | order | **no** | **1** | 3 | 2 | 1.500 | <= 1 |" in text
    assert "| `bad` | nothing is lost | invariant | yes |  | lost 0 |  |  |  |" in text


def test_claims_whose_test_or_method_is_gone_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a_test.py").write_text("def test_kept(claims): ...")
    for method, test in (("gptq", "test_kept[3]"), ("gptq", "test_kept_no_more"), ("no-such-method", "test_kept[3]")):
        Claims(tmp_path / "proof" / "claims", f"a_test.py::{test}").invariant(method, f"of {test}", True)
    Claims(tmp_path / "proof" / "claims").invariant("gptq", "of nobody knows which", True)
    gone = drop_orphans(tmp_path / "proof")
    assert gone == ["gptq: of test_kept_no_more", "no-such-method: of test_kept[3]"]
    left = kept_claims(tmp_path / "proof")
    assert {m: [c.statement for c in of] for m, of in left.items()} == {
        "gptq": ["of nobody knows which", "of test_kept[3]"]
    }


def test_claims_that_were_never_measured_are_told(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    tests = (
        "def test_kept(judge, claims): ...\ndef test_waits(claims): ...\ndef test_else(judge): ...\ndef of(claims): ..."
    )
    (tmp_path / "plugins" / "a_test.py").write_text(tests)
    Claims(tmp_path / "proof" / "claims", "plugins/a_test.py::test_kept[3]").invariant("gptq", "holds", True)
    waiting = unmeasured(tmp_path / "proof")
    assert waiting == ["plugins/a_test.py::test_waits"]
    assert "## Not measured yet" not in page({}, {}, ())
    assert page({}, {}, (), waiting).endswith("\n- `plugins/a_test.py::test_waits`\n")


def test_every_id_of_the_catalogue_is_on_the_page() -> None:
    text = page(catalogue(), {}, ())
    assert [i for known in catalogue().values() for k in known for i in k.ids if f"`{i}`" not in text] == []


def test_ids_are_listed_once() -> None:
    ids = [i for methods in catalogue().values() for known in methods for i in known.ids]
    assert len(ids) == len(set(ids))


@pytest.mark.slow  # of a release: methods are added before their long claims have been measured
def test_every_registered_method_has_a_kept_claim() -> None:
    missing = sorted({m.id for m in list_methods()} - kept_claims().keys())
    assert not missing, f"no claim kept of {missing}; run: pytest -m '' --claims proof/claims FILE, for their tests"


@pytest.mark.slow  # of a release: it changes with every method and every claim
def test_the_page_is_what_the_kept_claims_give() -> None:
    assert PAGE.read_text() == current(), "run: python -m hf_quant.testing.status"
