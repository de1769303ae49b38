"""Fixtures every test may use; the bench of trained models and the judge are in `hf_quant.testing.fixtures`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["hf_quant.testing.fixtures"]

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_lm_path() -> Path:
    """The trained 5M-parameter language model that ships with the repository."""
    return ROOT / "examples" / "models" / "tiny-lm"


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers in float32 run their format's reference, as on processors that multiply bfloat16: for what is compared to
    the bit with layers that lie on disk or were dequantized, which no kernel has laid out.
    """
    monkeypatch.setattr("hf_quant.kernels._cpu.native.why_not", lambda: "a test compares references")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread. Put back afterwards: sums depend on it, and other tests compare processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
