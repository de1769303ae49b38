"""Logits of the full-precision model: from a second model run beside the first, or stored once in a folder."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_quant.data import calibration
from hf_quant.data.reading import Data, Processor
from hf_quant.errors import RunError, UnsupportedModel
from hf_quant.running.progress import track

INDEX = "reference.json"
LOGITS = "logits.npy"


class Reference(Protocol):
    """Where full-precision logits come from."""

    @property
    def identity(self) -> str:
        """Changes when the logits would."""

    def logits(self, ids_BS: Tensor, start: int) -> Tensor:
        """Logits `[B, S, V]` of the windows `start .. start + B`, whose token ids are `ids_BS`."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveReference:
    """A second model, run beside the first."""

    model: nn.Module

    @property
    def identity(self) -> str:
        """A hash of its weights."""
        return identity(self.model)

    def logits(self, ids_BS: Tensor, start: int) -> Tensor:
        """See `Reference.logits`."""
        return forward(self.model, ids_BS)


@dataclass(frozen=True, slots=True)
class StoredReference:
    """Logits that `store` wrote, in the model's own precision, read a batch at a time."""

    folder: Path

    @property
    def identity(self) -> str:
        """A hash of the index, which names the model and the token ids."""
        return sha256((self.folder / INDEX).read_bytes()).hexdigest()

    def check(self, ids: Tensor) -> None:
        """Raise `RunError` when they are logits of other windows than `ids`."""
        if json.loads((self.folder / INDEX).read_text())["ids"] != calibration.fingerprint([{"input_ids": ids}]):
            raise RunError(
                f"the logits in {self.folder} were stored for other data, window or tokens; "
                "store them again, or pass the full-precision model"
            )

    def logits(self, ids_BS: Tensor, start: int) -> Tensor:
        """See `Reference.logits`."""
        index = json.loads((self.folder / INDEX).read_text())
        try:
            values = np.load(self.folder / LOGITS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {self.folder / LOGITS}: {error}; store the logits again") from error
        part = torch.from_numpy(np.array(values[start : start + len(ids_BS)]))
        return part.view(getattr(torch, index["dtype"])) if part.dtype == torch.int16 else part


@torch.no_grad()
def store(
    model: nn.Module,
    data: Data,
    folder: str | Path,
    *,
    processor: Processor = None,
    window: int = 512,
    tokens: int = 32768,
    batch_size: int = 4,
    progress: bool = True,
) -> StoredReference:
    """Write the model's logits on the windows that `evaluate` runs, so that many models can be measured without it.

    Takes `tokens * vocabulary` values of disk, exact: 16-bit logits are stored as such. The index is written last,
    so a killed run leaves nothing that could be read.

    Raises:
        CalibrationError: unusable data, see `calibration.token_windows`.
        RunError: the folder already holds logits.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise RunError(f"{folder} already holds stored logits; take another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    ids = calibration.spread_windows(data, processor, window, tokens)
    calibration.check_inputs([{"input_ids": ids}], model)
    model.eval()
    values: Any = None
    for start in track(range(0, len(ids), batch_size), description="storing logits", enabled=progress):
        logits = forward(model, ids[start : start + batch_size]).cpu()
        part = (logits.view(torch.int16) if logits.element_size() == 2 else logits.float()).numpy()
        if values is None:
            shape = (len(ids), *part.shape[1:])
            values = np.lib.format.open_memmap(folder / LOGITS, mode="w+", dtype=part.dtype, shape=shape)
        values[start : start + len(part)] = part
    values.flush()
    index = {
        "ids": calibration.fingerprint([{"input_ids": ids}]),
        "model": identity(model),
        "dtype": str(logits.dtype).removeprefix("torch."),
    }
    partial = folder / (INDEX + ".partial")
    partial.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(partial, folder / INDEX)
    return StoredReference(folder)


def forward(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """Logits `[B, S, V]` of a causal language model."""
    logits = getattr(model(input_ids=ids_BS.to(device_of(model)), use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids_BS.shape:
        raise UnsupportedModel(f"{type(model).__name__} gives no logits for every token; a causal language model does")
    return logits


def identity(model: nn.Module) -> str:
    """A hash of names, shapes and a thousand values of every parameter and buffer: quick, and it sees requantizing."""
    digest = sha256()
    named = chain(model.named_parameters(), model.named_buffers())
    for name, tensor in chain.from_iterable(_plain(*one) for one in named):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that it is made of: quantized ones of other libraries cannot be cut themselves."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs go."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device
