"""Claims are measured anew when what they measure has changed, wherever a package keeps its tests."""

import sys
from pathlib import Path

import pytest

from hf_quant import method as registry
from hf_quant.testing.sources import covered, fingerprint

PLUGINS = Path(__file__).parents[2] / "plugins"

PAPER = """
from hf_quant.method import Paper, method
from hf_quant.recipe import Recipe
from hf_quant.spec import int_spec
from strangers_methods.core import WIDTH
from strangers_methods import ranges

@method("a-strangers", paper=Paper(None, "A paper"), domains={"llm"}, claim="it is as good as it can be")
def a_strangers(bits: int = WIDTH) -> Recipe:
    return Recipe(weights=int_spec(bits, 32))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a method, imported."""
    registry.list_methods()
    monkeypatch.setattr(registry, "_METHODS", {**registry._METHODS})
    folder = tmp_path / "strangers_methods"
    folder.mkdir()
    for name, text in (("__init__", ""), ("core", "WIDTH = 4"), ("ranges", "X = 1"), ("paper", PAPER)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("strangers_methods.paper")
    for name in [n for n in sys.modules if n.startswith("strangers_methods")]:
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return folder


def test_of_another_package_all_that_its_methods_are_made_of(package: Path, tmp_path: Path) -> None:
    test = tmp_path / "tests" / "paper_test.py"
    test.parent.mkdir()
    test.write_text('def test_claim(judge, claims): judge.kls("a-strangers")')
    assert {test, *(package / f"{n}.py" for n in ("paper", "core", "ranges"))} <= set(covered(test))
    before = fingerprint(test)
    (package / "core.py").write_text("WIDTH = 3")
    assert fingerprint(test) != before


@pytest.mark.usefixtures("package")
def test_of_ours_what_it_imports(tmp_path: Path) -> None:
    found = covered((PLUGINS / "rounding" / "gptaq_test.py").resolve())
    assert PLUGINS.resolve() / "rounding" / "gptq.py" in [p.resolve() for p in found]
    assert not [p for p in found if p.is_relative_to(tmp_path)]
