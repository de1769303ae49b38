"""The bytes of `int-group/1`. That they decode, and that kernels agree, is in hf_quant/every_format_test.py."""

import pytest
import torch

from hf_quant.formats import Layer, format_named
from hf_quant.grids import FloatGrid, IntGrid, LevelGrid
from hf_quant.kernels.int_group.bitstream import pack_bits, unpack_bits, words
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, act_spec, int_spec

# Written by compressed-tensors 0.20.0 `pack_to_int32` for the 37 codes (37 i + 11) mod 2^b.
COMPRESSED_TENSORS = {
    1: (0x55555555, 0x00000015),
    2: (0x93939393, 0x93939393, 0x00000393),
    3: (0x43C67543, 0x7543C675, 0xC67543C6, 0x00007543),
    4: (0xE94FA50B, 0x61C72D83, 0xE94FA50B, 0x61C72D83, 0x000FA50B),
    5: (0x49FD560B, 0x71771372, 0x141BB458, 0x03F668F5, 0x30797935, 0x01FD560B),
    6: (0x1FE95C0B, 0xD6333A91, 0xD91B078B, 0x2F2A501B, 0xDA037B95, 0x1A1F17C8, 0x3F6B542B),
    7: (0xFF55580B, 0x331DA621, 0x64745F6C, 0x405B6C47, 0xE4A6F949, 0x535403BC, 0x0D85E17E, 0xF35D682B, 0x3),
    8: (
        0x7A55300B,
        0x0EE9C49F,
        0xA27D5833,
        0x3611ECC7,
        0xCAA5805B,
        0x5E3914EF,
        0xF2CDA883,
        0x86613C17,
        0x1AF5D0AB,
        0x3F,
    ),
}


def unsigned(tensor: torch.Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in tensor.flatten().tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_compressed_tensors(bits: int) -> None:
    codes = ((torch.arange(37) * 37 + 11) % (1 << bits)).to(torch.uint8)
    assert tuple(unsigned(pack_bits(codes, bits))) == COMPRESSED_TENSORS[bits]


def test_every_signed_4_bit_value() -> None:
    spec = int_spec(4, symmetric=True)
    codes = spec.grid.encode(torch.arange(-8.0, 8.0)[None])
    tensors = format_named("int-group/1").pack(QTensor(codes, torch.ones(1, 1), None, spec, (1, 16)))
    assert unsigned(tensors["qweight"]) == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33, 63, 100])
def test_stream_against_arithmetic_on_one_big_integer(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, words(count, bits))
    for row, stream in zip(codes.tolist(), packed, strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert sum(w << (32 * i) for i, w in enumerate(unsigned(stream))) == number
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    assert torch.equal(unpack_bits(packed.T.contiguous().T, bits, count), codes)  # any strides


def test_zero_points_are_a_stream_along_dim_0() -> None:
    spec = int_spec(4, 2)
    zero = torch.tensor([[0.0, 15.0], [1.0, 14.0], [2.0, 13.0]])
    q = QTensor(torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3, 2), zero, spec, (3, 4))
    assert unsigned(format_named("int-group/1").pack(q)["zero_point"]) == [0x210, 0xDEF]


@pytest.mark.parametrize(
    ("spec", "inputs", "reason"),
    [
        (Spec(grid=LevelGrid((-1.0, 1.0))), None, "integer grid"),
        (Spec(grid=IntGrid(4), scale=IntGrid(8)), None, "float type"),
        (Spec(grid=IntGrid(4), zero="float"), None, "float zero"),
        (Spec(grid=IntGrid(4), index="timestep"), None, "nothing but the block"),
        (Spec(grid=IntGrid(4), block=(2, 16)), None, "blocks of 2 rows"),
        (int_spec(4), Spec(grid=FloatGrid("float8_e4m3fn")), "inputs need integers or small floats"),
        (int_spec(4), Spec(grid=IntGrid(8), block=(1, -1)), "static inputs have one scale"),
    ],
)
def test_what_it_does_not_hold_has_a_reason(spec: Spec, inputs: Spec | None, reason: str) -> None:
    assert reason in (format_named("int-group/1").holds(Layer((4, 32), spec, inputs)) or "")


def test_check_names_the_wrong_tensor() -> None:
    layer, fmt = Layer((4, 40), int_spec(3, 16), act_spec(8, static=True, symmetric=False)), format_named("int-group/1")
    good = {n: torch.ones(s, dtype=t) for n, (s, t) in fmt.layout(layer).items()}
    assert fmt.check(good, layer) is None
    assert "scale holds NaN" in str(fmt.check(good | {"scale": torch.full((4, 3), torch.nan)}, layer))
    assert "qweight is torch.int32 [4, 3]" in str(fmt.check(good | {"qweight": good["qweight"][:, :3]}, layer))
    assert "zero_point is torch.int64" in str(fmt.check(good | {"zero_point": good["zero_point"].long()}, layer))
    assert "expected" in str(fmt.check({n: t for n, t in good.items() if n != "input_scale"}, layer))
    assert "not positive" in str(fmt.check(good | {"input_scale": torch.zeros(1)}, layer))
    assert "outside 0 .. 255" in str(fmt.check(good | {"input_zero_point": torch.tensor([256]).int()}, layer))


@pytest.mark.parametrize("groups", [1, 2])
def test_zero_points_of_one_word(groups: int) -> None:
    """8 rows of 4-bit zero points are one word a group: transposed, that counts as contiguous and is not."""
    spec, shape = int_spec(4, 8), (8, 8 * groups)
    codes = torch.arange(64 * groups).reshape(shape).remainder(16).to(torch.uint8)
    zero = torch.arange(8 * groups).reshape(8, groups).remainder(16).float()
    q = QTensor(codes, torch.ones(8, groups), zero, spec, shape)
    fmt = format_named("int-group/1")
    tensors = fmt.pack(q)
    assert tensors["zero_point"].shape == (1, groups)
    back = fmt.unpack(tensors, Layer(shape, spec))
    assert back.zero is not None
    assert torch.equal(back.zero, zero)
    assert torch.equal(fmt.weight(tensors, Layer(shape, spec), torch.float32), q.dequantize())
