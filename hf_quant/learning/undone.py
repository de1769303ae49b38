"""What transformers' Trainer does besides training, undone: seeds, accelerate's state, modules, remarks."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_quant.running.distributed import sharded


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
def own_accelerator() -> Iterator[None]:
    """The Trainer makes accelerate forget how it was set up, and sets it up its own way, for the whole process.

    Under ZeRO 3 transformers would share out every model that is loaded from then on, too.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = [(s._shared_state, dict(s._shared_state)) for s in (PartialState, AcceleratorState, GradientState)]
    try:
        yield
    finally:
        for state, before in kept:
            state.clear()
            state.update(before)
        unset_hf_deepspeed_config()


@contextmanager
def own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """A second tree of modules over the same tensors, frozen: what training does to modules, the model never sees.

    Where the tensors are shared out among processes, the model waits in the host's memory meanwhile.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            shared[id(parameter)] = nn.Parameter(parameter.detach().contiguous(), requires_grad=False)
    tree = copy.deepcopy(model, shared)
    if not sharded():
        yield tree
        return
    device = next(model.parameters()).device
    model.to("cpu")
    try:
        yield tree
    finally:
        model.to(device)


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
