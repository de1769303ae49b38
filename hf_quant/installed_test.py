"""Packages that bring methods and formats: one that is broken takes nobody else with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_quant import list_methods
from hf_quant.errors import CheckpointError, ConfigError
from hf_quant.formats import format_named, formats
from hf_quant.method import _load, method_named


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hf_quant.methods]\na = broken_methods\n"
        "[hf_quant.formats]\na = broken_methods\nb = hf_quant.kernels.int_float_zero.format:IntFloatZero\n"
    )
    (tmp_path / "broken_methods.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("hf_quant.installed._broken", {})
    _load.cache_clear()
    formats.cache_clear()
    yield
    _load.cache_clear()
    formats.cache_clear()


def test_a_broken_package_is_one_warning_and_named_where_it_is_missed(
    package: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert {"rtn", "gptq"} <= {m.id for m in list_methods()}
    assert format_named("int-group/1").id == "int-group/1"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert "broken_methods of the package theirs (ModuleNotFoundError: No module named 'no_such_package')" in told[0]
    assert "a tuple of PackedFormat is wanted, not ABCMeta" in told[2]
    with pytest.raises(ConfigError, match="not loaded: broken_methods of the package theirs"):
        method_named("their-method")
    with pytest.raises(CheckpointError, match="the package that brings it; not loaded: broken_methods of the package"):
        format_named("their-format/1")
