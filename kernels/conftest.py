"""What kernel tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton decides when a kernel is defined whether it will be interpreted: those tests run in a process of their own.
collect_ignore_glob = [] if INTERPRETED else ["*_interpreted_test.py"]


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """In the interpreter's process, memory that nobody wrote reads as NaN."""
    if INTERPRETED:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
