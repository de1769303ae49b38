"""Fixtures every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from hf_quant.testing import Claims

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_lm_path() -> Path:
    """The trained 5M-parameter language model that ships with the repository."""
    return ROOT / "examples" / "models" / "tiny-lm"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--claims FOLDER` keeps what the claim tests measure."""
    parser.addoption("--claims", type=Path, default=None, metavar="FOLDER", help="write claims as JSON into FOLDER")


@pytest.fixture(scope="session")
def claims(request: pytest.FixtureRequest) -> "Claims":
    """Checks the claims of papers, see `hf_quant.testing.claims`."""
    from hf_quant.testing import Claims

    return Claims(request.config.getoption("claims"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread. Put back afterwards: sums depend on it, and other tests compare processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
