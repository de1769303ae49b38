"""What transformers' Trainer does besides training, undone: seeds, a setting of the model, remarks."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def own_generators() -> Iterator[None]:
    """The Trainer seeds the global generators; they are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def own_cache(model: nn.Module) -> Iterator[None]:
    """The Trainer writes `use_cache` into the model's config, even where there was none; it is put back."""
    config: Any = getattr(model, "config", None)
    had, before = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if had:
            config.use_cache = before
        elif hasattr(config, "use_cache"):
            del config.use_cache


@contextmanager
def quiet() -> Iterator[None]:
    """Without the Trainer's remarks on end-of-text tokens."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
