"""The checks of formats, on one of a stranger's: a sound one passes all of them, and each fault is found by one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_quant.formats import Layer, PackedFormat, Tensors
from hf_quant.grids import FloatGrid, IntGrid
from hf_quant.qtensor import QTensor
from hf_quant.runtime.activation import refuses
from hf_quant.spec import int_spec
from hf_quant.testing import format_conformance
from hf_quant.testing.format_conformance import CHECKS, Check
from hf_quant.testing.format_layers import sample_layers

HELD = (int_spec(4, 32, symmetric=True), int_spec(8, -1, symmetric=True))


class Bytes(PackedFormat):
    """A byte a code, symmetric integers."""

    id = "test-bytes/1"

    def holds(self, layer: Layer) -> str | None:
        spec = layer.weights
        if not isinstance(spec.grid, IntGrid) or not isinstance(spec.scale, FloatGrid) or spec.zero != "none":
            return "weights need symmetric integers"
        if spec.block[0] != 1 or spec.tensor_scale or spec.rotation is not None:
            return "a scale belongs to one row, and is all there is"
        return refuses(layer.inputs)

    def weight_layout(self, layer: Layer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"qweight": (layer.shape, torch.uint8), "scale": (layer.weights.blocks(layer.shape), torch.float32)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        return {"qweight": q.codes.to(torch.uint8).contiguous(), "scale": q.scale.float().contiguous()}

    def unpack(self, tensors: Tensors, layer: Layer) -> QTensor:
        return QTensor(tensors["qweight"], tensors["scale"].float(), None, layer.weights, layer.shape)


class Nameless(Bytes):
    id = "Test_Nameless"


class Mute(Bytes):
    id = "test-mute/1"

    def holds(self, layer: Layer) -> str | None:
        return None if super().holds(layer) is None else "no"


class Forgetful(Bytes):
    id = "test-forgetful/1"

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        return {**super().pack(q), "scale": q.scale.to(torch.float8_e5m2).float()}


class Moody(Bytes):
    id = "test-moody/1"
    packed = 0

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        Moody.packed += 1
        return {**super().pack(q), "scale": q.scale + Moody.packed}


class Loose(Bytes):
    id = "test-loose/1"

    def reference(self, x_TK: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        return super().reference(x_TK, tensors, layer) * 1.01


class Sloppy:
    name = "sloppy"

    def supports(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and layer.inputs is None else "only on CPU, inputs as they are"

    def prepare(self, tensors: Tensors, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        return []

    def run(self, x_TK: Tensor, tensors: Tensors, blob: list[Tensor], layer: Layer) -> Tensor:
        return (
            x_TK
            @ QTensor(
                tensors["qweight"], tensors["scale"].to(torch.float8_e5m2).float(), None, layer.weights, layer.shape
            )
            .dequantize(x_TK.dtype)
            .T
        )


class Hasty(Bytes):
    id = "test-hasty/1"
    kernels = (Sloppy(),)


class Impure(Bytes):
    id = "test-impure/1"

    def reference(self, x_TK: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        y_TN = super().reference(x_TK, tensors, layer)
        tensors["scale"].add_(1)
        return y_TN


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the formats of this file."""
    ids = (Bytes, Mute, Forgetful, Moody, Loose, Hasty, Impure)
    (tmp_path / "README.md").write_text(f"{[f.id for f in ids]}: qweight, scale")
    monkeypatch.setattr(format_conformance, "readme_of", lambda _: tmp_path / "README.md")


SOUND = Bytes()


@pytest.mark.usefixtures("readme")
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_sound_format_keeps_the_contracts(check: Check, tmp_path: Path) -> None:
    layers = sample_layers(SOUND)
    assert len(layers) > 100
    check(SOUND, [layer for layer in layers if layer.weights in HELD], tmp_path)


@pytest.mark.usefixtures("readme")
@pytest.mark.parametrize(
    ("make", "check"),
    [
        (Nameless, format_conformance.says_in_writing_what_its_bytes_are),
        (Mute, format_conformance.its_refusals_have_reasons),
        (Forgetful, format_conformance.unpacks_what_it_packs),
        (Moody, format_conformance.packs_the_same_twice_and_survives_the_disk),
        (Loose, format_conformance.its_reference_is_the_definition),
        (Hasty, format_conformance.its_kernels_compute_the_same),
        (Impure, format_conformance.its_products_are_operators),
    ],
    ids=lambda given: given.__name__,
)
def test_every_fault_is_found(make: Callable[[], PackedFormat], check: Check, tmp_path: Path) -> None:
    fmt = make()
    layers = [layer for layer in sample_layers(fmt) if layer.weights in HELD]
    with pytest.raises(AssertionError):
        check(fmt, layers, tmp_path)


def test_a_failure_says_on_which_layer(tmp_path: Path) -> None:
    fmt = Forgetful.__new__(Forgetful)
    layers = [layer for layer in sample_layers(SOUND) if layer.weights == HELD[0]][:1]
    with pytest.raises(AssertionError) as raised:
        format_conformance.unpacks_what_it_packs(fmt, layers, tmp_path)
    assert raised.value.__notes__ == [f"on {layers[0]}"]
