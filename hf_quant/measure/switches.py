"""Switches: a float model in which weights and inputs are quantized site by site, on and off again."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_quant
from hf_quant.capture import run_model, running
from hf_quant.config import QuantConfig
from hf_quant.data.reading import Batch
from hf_quant.errors import UnsupportedModel
from hf_quant.measure.reference_logits import device_of
from hf_quant.qtensor import from_extremes
from hf_quant.runtime.activation import fake_quantize, pack_input
from hf_quant.runtime.packed import Packed
from hf_quant.spec import Spec

OUTLIER = 8.0  # times the median channel's largest value


@dataclass(slots=True, eq=False)
class Patient:
    """The model with its switches.

    Attributes:
        model: in full precision.
        batches: what it is measured on.
        names: the sites.
        spec: how inputs are rounded.
        weights: site -> its rounded weight, see `rounded`.
    """

    model: nn.Module
    batches: Sequence[Batch]
    names: Sequence[str]
    spec: Spec
    weights: dict[str, Tensor] | None = None
    _logits: Tensor | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Logits, `[B, S, V]` of tokens or `[B, V]` of classes.

        Raises:
            CalibrationError: the model does not take the batch.
            UnsupportedModel: it has no logits.
        """
        with running(self.model, batch, "a batch of the data"):
            logits = getattr(run_model(self.model, batch, device_of(self.model)), "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(f"{type(self.model).__name__} gives no logits: only what predicts can be examined")
        return logits

    def logits(self) -> Tensor:
        """Of all predictions, `[n, V]`."""
        return torch.cat([self.forward(batch).flatten(0, -2) for batch in self.batches])

    def reference(self) -> Tensor:
        """Log-probabilities in full precision, in float64."""
        if self._logits is None:
            self._logits = self.logits().double().log_softmax(-1)
        return self._logits

    def perplexity(self) -> float | None:
        """Of the full-precision model; None where it does not predict the next token."""
        nexts = [F.pad(batch["input_ids"][:, 1:], (0, 1), value=-1) for batch in self.batches if "input_ids" in batch]
        if not nexts or sum(t.numel() for t in nexts) != len(self.reference()):
            return None
        targets = torch.cat([t.flatten() for t in nexts]).to(self.reference().device)
        return float(F.nll_loss(self.reference(), targets, ignore_index=-1).exp())

    def kl(self, weights: Sequence[str], inputs: Sequence[str], given: dict[str, Tensor] | None = None) -> float:
        """Mean KL with these switches on."""
        log_p = self.reference()
        with self.switched(weights, inputs, given):
            log_q = self.logits().double().log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    def kl_of(self, config: QuantConfig, data: Sequence[Batch] | None) -> float:
        """Mean KL with all weights as the method rounds them on this calibration data."""
        return self.kl(self.names, (), self.rounded(config, data))

    @contextmanager
    def switched(
        self, weights: Sequence[str], inputs: Sequence[str], given: dict[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Round the weights of these sites and the inputs of those, until the block ends."""
        rounded = given or self.weights or {}
        with ExitStack() as stack:
            for name in weights:
                parameter = self.model.get_submodule(name).weight
                assert isinstance(parameter, Tensor)  # noqa: S101  such sites alone are examined
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = rounded[name].to(parameter)
            for name in inputs:
                handle = self.model.get_submodule(name).register_forward_pre_hook(self.round_input)
                stack.callback(handle.remove)
            yield

    def round_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook."""
        x, spec = args[0], self.spec
        flat = x.reshape(-1, x.shape[-1])
        tensors: dict[str, Tensor] = {}
        if spec.range == "static":  # the range of what is there: the best a static range could be
            tensors = pack_input(*from_extremes(flat.amin().reshape(1, 1), flat.amax().reshape(1, 1), spec))
        return fake_quantize(flat, spec, tensors).reshape(x.shape), *args[1:]

    def rounded(self, config: QuantConfig, data: Sequence[Batch] | None) -> dict[str, Tensor]:
        """Site -> its weight as the method rounds it, laid out as the module has it."""
        twin = copy.deepcopy(self.model)
        hf_quant.quantize(twin, config, data=data, progress=False)
        found = {}
        for name in self.names:
            packed, weight = twin.get_submodule(name), self.model.get_submodule(name).weight
            assert isinstance(packed, Packed)  # noqa: S101  it was planned
            assert isinstance(weight, Tensor)  # noqa: S101
            W_NK = packed.dequantize(torch.float32)
            found[name] = (
                W_NK if W_NK.shape == weight.shape and not _transposed(self.model, name) else W_NK.T.contiguous()
            )
        return found

    def channels(self) -> dict[str, tuple[float, float, list[int]]]:
        """Site -> (peak, kurtosis, outlier channels) of its inputs."""
        tops: dict[str, Tensor] = {}
        moments: dict[str, list[tuple[float, float]]] = {n: [] for n in self.names}

        def watch(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                top = x.abs().amax(0)
                tops[name] = torch.maximum(tops[name], top) if name in tops else top
                square = (x - x.mean()).square()
                moments[name].append((float(square.mean()), float(square.square().mean())))

            return see

        handles = [self.model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in self.names]
        try:
            self.logits()
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, top in tops.items():
            ratio = top / top.median().clamp_min(1e-12)
            second, fourth = (statistics.fmean(m[i] for m in moments[name]) for i in (0, 1))
            far = (ratio > OUTLIER).nonzero()[:, 0].tolist()
            found[name] = float(ratio.max()), fourth / max(second**2, 1e-24), far
        return found

    def stream(self, blocks: Sequence[str]) -> list[float]:
        """Relative squared error behind every block, with everything quantized."""

        def run() -> list[Tensor]:
            seen: list[Tensor] = []
            hook = lambda _, __, out: seen.append((out if isinstance(out, Tensor) else out[0]).detach().float())  # noqa: E731
            handles = [self.model.get_submodule(b).register_forward_hook(hook) for b in blocks]
            try:
                self.forward({name: tensor[:2] for name, tensor in self.batches[0].items()})
            finally:
                for handle in handles:
                    handle.remove()
            return seen

        exact = run()
        with self.switched(self.names, self.names):
            moved = run()
        return [float((b - a).square().sum() / a.square().sum()) for a, b in zip(exact, moved, strict=True)]


def _transposed(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"
