"""The import hook, on made-up libraries; with the real ones it is tested in integration_tests/packaging_test.py."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_quant import _autoload


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `somelib` with a registry, and `ours`, which registers with it when imported."""
    (tmp_path / "somelib").mkdir()
    (tmp_path / "somelib" / "__init__.py").write_text("")
    (tmp_path / "somelib" / "registry.py").write_text("NAMES = []\ndef here(): return __loader__, __spec__.loader\n")
    (tmp_path / "ours.py").write_text("from somelib.registry import NAMES\nNAMES.append('hf_quant')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_autoload, "INTEGRATIONS", {"somelib.registry": "ours"})
    yield tmp_path
    for name in ("somelib", "somelib.registry", "ours"):
        sys.modules.pop(name, None)


def names() -> list[str]:
    return importlib.import_module("somelib.registry").NAMES


def test_registers_right_after_the_registry_is_imported(library: Path) -> None:
    _autoload.install()
    assert "ours" not in sys.modules
    assert names() == ["hf_quant"]


def test_registers_at_once_with_a_registry_already_imported(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _autoload._Finder)])
    assert names() == []
    _autoload.install()
    assert names() == ["hf_quant"]


def test_a_registry_half_way_through_its_import_is_left_to_a_later_trigger(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `import transformers.quantizers.auto` is what imports torch, which calls us."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _autoload._Finder)])
    (library / "somelib" / "registry.py").write_text(
        "from hf_quant import _autoload\n_autoload.install()\nimport sys\nEARLY = 'ours' in sys.modules\nNAMES = []\n"
    )
    (library / "somelib" / "models.py").write_text("import somelib.registry\n")
    _autoload.INTEGRATIONS["somelib.models"] = "ours"
    assert names() == []
    assert not importlib.import_module("somelib.registry").EARLY
    importlib.import_module("somelib.models")
    assert names() == ["hf_quant"]
    del sys.modules["somelib.models"]


def test_installing_twice_adds_one_finder_and_registers_once(library: Path) -> None:
    _autoload.install()
    _autoload.install()
    assert sum(isinstance(f, _autoload._Finder) for f in sys.meta_path) == 1
    assert names() == ["hf_quant"]


def test_the_module_keeps_its_own_loader(library: Path) -> None:
    _autoload.install()
    loaders = importlib.import_module("somelib.registry").here()
    assert all(type(loader).__name__ == "SourceFileLoader" for loader in loaders)


def test_a_broken_integration_is_reported_and_the_library_still_imports(
    library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (library / "ours.py").write_text("raise RuntimeError('no good')\n")
    _autoload.install()
    with caplog.at_level(logging.WARNING, "hf_quant"):
        assert names() == []
    assert "could not register with somelib.registry" in caplog.text
    assert "no good" in caplog.text


def test_a_library_that_is_not_installed_is_still_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autoload, "INTEGRATIONS", {"no_such_library": "ours"})
    _autoload.install()
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        importlib.import_module("no_such_library")
