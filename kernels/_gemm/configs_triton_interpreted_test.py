"""Which configuration runs, and tuning, in the interpreter's process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_quant.kernels._gemm import configs
from hf_quant.kernels._gemm.configs import BUCKETS, SHARED, Config, bucket, choose, default, fitted, key, shipped
from hf_quant.kernels._gemm.operand import Weight
from hf_quant.kernels._gemm.tune import candidates, tune

CPU, W4 = torch.device("cpu"), Weight((256, 512), 4, 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.remembered.cache_clear()
    choose.cache_clear()
    yield
    configs.remembered.cache_clear()
    choose.cache_clear()


def test_few_tokens_many_tokens_and_more() -> None:
    ways = [choose(W4, torch.float16, bucket(m), CPU).way for m in (1, 3, 4, 5, 64, 256, 257, 100_000)]
    assert ways == ["tensor", "tensor", "tensor", "tensor", "tensor", "tensor", "dense", "dense"]


@pytest.mark.parametrize("target", sorted(SHARED))
def test_every_shipped_configuration_fits_its_machine(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "limits", lambda _: (SHARED[target], 100))
    for bits in (2, 3, 4, 8):
        weight = Weight((4096, 4096), bits, 128)
        for b in BUCKETS:
            config = fitted(default(target, b), weight, torch.float16, CPU)
            assert config.way == "dense" or config.shared_bytes(weight, 2) <= SHARED[target]
            assert config.way == "dense" or config.splits <= weight.shuffle.blocks(weight.shape)[1]


def test_no_program_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 has room for 14 programs of 3 bits a processor: 8 parts of 256 tiles would be 2048 of 1848."""
    monkeypatch.setattr(configs, "limits", lambda _: (SHARED["sm_90"], 132))
    monkeypatch.setattr(configs, "kind", lambda _: "sm_90")
    few = default("sm_90", 1)
    assert fitted(few, Weight((8192, 8192), 4, 128, ranges="pairs"), torch.float16, CPU) == few
    assert fitted(few, Weight((8192, 8192), 3, 128, ranges="pairs"), torch.float16, CPU) == replace(few, splits=7)


def test_a_machine_without_its_own_has_that_of_its_nearest() -> None:
    assert default("sm_120", 1) == shipped()["sm_100"]["16"]
    assert default("sm_89", 16) == shipped()["sm_80"]["16"]
    assert default("gfx1201", 4) == shipped()["gfx942"]["8"]


def test_candidates_fit_and_are_many() -> None:
    for tokens in (1, 16, 128):
        found = list(candidates(W4, torch.float16, tokens, CPU))
        assert len(found) > 20
        assert all(c.way == "dense" or c.shared_bytes(W4, 2) <= SHARED["sm_80"] for c in found)
        assert all(tokens <= c.BM for c in found if c.way != "dense")


def test_what_was_tuned_is_remembered_and_used() -> None:
    weight = Weight((32, 64), 4, 64)
    blob = [
        weight.shuffle.pack(torch.randint(0, 16, (32, 64), dtype=torch.uint8)),
        torch.ones(1, 32),
    ]
    before = choose(weight, torch.float32, bucket(7), CPU)
    slow, quick = Config("tensor", BM=16, BN=16, splits=2), Config("dense")
    found = tune(blob, weight, torch.float32, tokens=[8], among=[slow, quick])
    ((name, best),) = found.items()
    assert name == key(weight, torch.float32, 7)
    assert best in (before, slow, quick)
    configs.remembered.cache_clear()
    choose.cache_clear()
    assert choose(weight, torch.float32, bucket(7), CPU) == best  # read back from the file
    assert choose(weight, torch.float32, bucket(100), CPU) != best or best == quick


def test_a_broken_file_counts_as_none() -> None:
    path = configs.cache_file(CPU)
    path.parent.mkdir(parents=True)
    for text in ("{", '{"a": {"nonsense": 1}}', "[]"):
        path.write_text(text)
        configs.remembered.cache_clear()
        choose.cache_clear()
        assert choose(W4, torch.float16, 1, CPU) == fitted(default("sm_80", 1), W4, torch.float16, CPU)
