"""Lookup of formats and kernels. What every format owes: every_format_test.py."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from hf_quant.errors import CheckpointError, ConfigError, UnsupportedSpec
from hf_quant.formats import Layer, choose_kernel, format_for, format_named, formats
from hf_quant.grids import LevelGrid
from hf_quant.kernels.bnb_4bit.format import FP4, NF4, Bnb4Bit
from hf_quant.spec import Spec, act_spec, int_spec


@pytest.fixture
def fresh() -> Iterator[None]:
    """`formats()` looks again, and forgets what it saw."""
    formats.cache_clear()
    yield
    formats.cache_clear()


@pytest.mark.parametrize(
    ("layer", "format_id"),
    [
        (Layer((8, 8), int_spec(8, symmetric=True), act_spec(8)), "int8-act/1"),
        (Layer((8, 8), int_spec(8, symmetric=True)), "int-group/1"),
        (Layer((8, 8), int_spec(4, 4), act_spec(8)), "int-group/1"),
    ],
)
def test_the_plan_takes_the_fastest_that_holds(layer: Layer, format_id: str) -> None:
    assert format_for(layer).id == format_id


def test_a_layer_nobody_holds_lists_every_reason() -> None:
    with pytest.raises(UnsupportedSpec) as caught:
        format_for(Layer((8, 8), Spec(grid=LevelGrid((0.0, 1.0)), zero="float")))
    for fmt in formats().values():
        assert fmt.id in str(caught.value)


def test_an_unknown_id_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"int-group/9.*int-group/1.*newer"):
        format_named("int-group/9")


def test_kernels_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "no compiler")
    layer = Layer((16, 64), int_spec(4, 32))
    name, refused = choose_kernel(format_named("int-group/1"), layer, torch.device("cpu"), torch.bfloat16)
    assert (name, refused) == ("torch-int4-cpu", {"native-cpu": "no compiler"})
    name, refused = choose_kernel(format_named("int-group/1"), layer, torch.device("cpu"), torch.float32)
    assert name == "reference"
    assert refused["torch-int4-cpu"] == "fast in bfloat16 only, not float32"


def test_formats_of_installed_packages(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point adds formats; it cannot replace one."""

    mine = Bnb4Bit("mine", NF4)
    entry = SimpleNamespace(load=lambda: (mine,))
    monkeypatch.setattr("hf_quant.installed.entry_points", lambda group: [entry] if group == "hf_quant.formats" else [])
    assert format_named("bnb-mine/1") is mine
    with pytest.raises(ConfigError, match=r"'bnb-nf4/1' exists already"):
        Bnb4Bit("nf4", FP4)
