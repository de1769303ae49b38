"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def tiny_lm_path() -> Path:
    """The trained 5M-parameter language model that ships with the repository."""
    return ROOT / "examples" / "models" / "tiny-lm"
