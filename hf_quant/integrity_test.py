import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_quant.errors import CheckpointError
from hf_quant.integrity import SEAL, config_crc, dtype_name, read_header, seal, verify

CONFIG = {"hidden": 3, "eps": 1e-6, "transformers_version": "5.0"}


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        **{f"a.{i}.scale": torch.randn(5, 7, generator=g).to(torch.bfloat16) for i in range(3)},
        "qweight": torch.randint(0, 99, (3, 4), dtype=torch.int32, generator=g),
        "flag": torch.tensor([True]),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "half": torch.randn(2, 3, generator=g).half().T,  # not contiguous
    }


@pytest.fixture
def saved(tmp_path):
    file, data = tmp_path / "model.safetensors", tensors()
    metadata = {"format": "pt"} | seal(data, config=CONFIG)
    save_file({k: v.contiguous() for k, v in data.items()}, file, metadata=metadata)
    return file


def test_intact(saved):
    header = verify([saved], config=CONFIG, sealed=True)
    assert {n: s.shape for n, s in header.items()} == {n: tuple(t.shape) for n, t in tensors().items()}
    assert verify([saved], config={**CONFIG, "transformers_version": "6.0"}, sealed=True) == header


def test_every_flipped_bit_is_an_error(saved):
    data, same = saved.read_bytes(), tensors()
    unharmed = 0
    for bit in range(0, len(data) * 8, 11):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        saved.write_bytes(damaged)
        try:
            verify([saved], config=CONFIG, sealed=True)
        except CheckpointError:
            continue
        unharmed += 1  # in the word "format": nothing of ours
        loaded = load_file(saved)
        assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in same.items())
    assert unharmed < 10


def test_a_damaged_tensor_is_named(saved):
    where = read_header([saved])["a.1.scale"]
    data = bytearray(saved.read_bytes())
    data[where.begin + 3] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor a\.1\.scale is not what was saved"):
        verify([saved])


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        verify([saved])


def test_random_damage_of_any_kind(saved):
    data, same, rng = saved.read_bytes(), tensors(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        at, length = rng.randrange(len(data)), rng.choice([1, 2, 8, 64])
        kind = rng.choice(["overwrite", "delete", "insert", "zero", "swap"])
        if kind == "overwrite":
            damaged[at : at + length] = rng.randbytes(len(damaged[at : at + length]))
        elif kind == "delete":
            del damaged[at : at + length]
        elif kind == "insert":
            damaged[at:at] = rng.randbytes(length)
        elif kind == "zero":
            damaged[at : at + length] = bytes(len(damaged[at : at + length]))
        else:
            other = rng.randrange(len(data))
            damaged[at], damaged[other] = damaged[other], damaged[at]
        saved.write_bytes(damaged)
        try:
            verify([saved], config=CONFIG, sealed=True)
        except CheckpointError:
            continue
        loaded = load_file(saved)
        assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in same.items())


def test_config_is_covered(saved):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify([saved], config={**CONFIG, "eps": 1e-5})
    assert config_crc({"a": 1, "b": [1.0]}) == config_crc(json.loads('{"b": [1.0],\n "a": 1}'))


def test_a_lost_seal_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    assert list(verify([file])) == ["x"]
    with pytest.raises(CheckpointError, match="checksums"):
        verify([file], sealed=True)


def test_shards(tmp_path):
    data = tensors()
    metadata = seal(data)
    names = sorted(data)
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, part in zip(files, (names[:4], names[4:]), strict=True):
        save_file({n: data[n].contiguous() for n in part}, file, metadata=metadata)
    assert set(verify(files)) == set(data)
    with pytest.raises(CheckpointError, match="missing"):
        verify(files[:1])
    other = {**data, "scalar": torch.tensor(4.0)}
    save_file({n: other[n].contiguous() for n in names[4:]}, files[1], metadata=seal(other))
    with pytest.raises(CheckpointError, match=r"2\.safetensors: belongs to another checkpoint"):
        verify(files)
    save_file({n: data[n].contiguous() for n in names[3:]}, files[1], metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is in 1\.safetensors as well"):
        verify(files)


def test_either_naming_is_accepted(tmp_path):
    data = tensors()
    renamed = {f"model.{n}": t for n, t in data.items()}
    for i, naming in enumerate((data, renamed)):
        file = tmp_path / f"{i}.safetensors"
        save_file({n: t.contiguous() for n, t in naming.items()}, file, metadata=seal(data, renamed))
        assert set(verify([file], sealed=True)) == set(naming)
    assert len(json.loads(seal(data, dict(data))[SEAL])["namings"]) == 1


def test_nothing_is_sealed_without_data():
    assert seal({"x": torch.empty(2, device="meta")}) == {}


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header([tmp_path / "none.safetensors"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_type_names_are_safetensors_own(dtype, tmp_path):
    save_file({"x": torch.zeros(2, dtype=dtype)}, tmp_path / "x.safetensors")
    assert read_header([tmp_path / "x.safetensors"])["x"].dtype == dtype_name(dtype)
