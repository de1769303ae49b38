"""What claim tests share: a trained language model, and how far quantizing moves it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_quant
from hf_quant import QuantConfig
from hf_quant.testing import inject_outliers

SAMPLES, LENGTH, WINDOWS = 16, 256, 16
Key = tuple[str, int, bool, tuple[tuple[str, Any], ...]]


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of every next token: `[windows, length, vocabulary]`."""
    return torch.cat([model(part).logits.log_softmax(-1) for part in ids.split(8)])


@dataclass
class Judge:
    """Quantizes the trained tiny-lm with the method asked for and measures it; every result is kept for the session."""

    path: Path
    calibration: Tensor
    test: Tensor
    expected: Tensor  # log-probabilities of the original on `test`
    measured: dict[Key, tuple[float, float]] = field(default_factory=dict)

    def model(self, outliers: bool = False) -> nn.Module:
        """The model in float32; `outliers`: with the outlier channels that large models have and it lacks."""
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        if outliers:
            inject_outliers(model, {"input_ids": self.test[:1]})
        return model

    def data(self, seed: int) -> Tensor:
        """Calibration sequences; no seed sees those of another."""
        return self.calibration[seed * SAMPLES : (seed + 1) * SAMPLES]

    def _measure(self, method: str, seed: int, outliers: bool, arguments: dict[str, Any]) -> tuple[float, float]:
        key = (method, seed, outliers, tuple(sorted(arguments.items())))
        if key not in self.measured:
            model = self.model(outliers)
            hf_quant.quantize(model, QuantConfig(method, **arguments), data=self.data(seed), progress=False)
            log_q = log_probabilities(model, self.test)
            kl = (self.expected.exp() * (self.expected - log_q)).sum(-1).mean()
            same = (self.expected.argmax(-1) == log_q.argmax(-1)).float().mean()
            self.measured[key] = float(kl), 100 * float(same)
        return self.measured[key]

    def kl(self, method: str, *, seed: int = 0, outliers: bool = False, **arguments: Any) -> float:
        """Mean KL of a token's distribution to the original model's, on held-out text."""
        return self._measure(method, seed, outliers, arguments)[0]

    def top1(self, method: str, *, seed: int = 0, outliers: bool = False, **arguments: Any) -> float:
        """Percent of held-out tokens whose most likely successor stays the same."""
        return self._measure(method, seed, outliers, arguments)[1]


@pytest.fixture(scope="session")
def judge(tiny_lm_path: Path) -> Judge:
    """See `Judge`."""
    data = tiny_lm_path.parents[1] / "data"
    calibration, test = (
        torch.from_numpy(np.load(data / f"tiny_{part}.npy").astype(np.int64)) for part in ("calib", "test")
    )
    every = test.numel() // LENGTH // WINDOWS  # windows from all over the held-out text
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_path, dtype=torch.float32)
    windows = test[: test.numel() // LENGTH * LENGTH].reshape(-1, LENGTH)[::every][:WINDOWS]
    return Judge(tiny_lm_path, calibration[:, :LENGTH], windows, log_probabilities(model, windows))
