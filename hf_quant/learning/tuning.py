"""Tuning, seen from the loop: cache what goes into a unit on both paths, let the tuner fit it, install what it gives.

Float layers change places with the quantized ones that the solver made: a unit is float while it is fitted, its
surroundings as quantized as they are by then; on the full-precision path everything is float.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import first_tensor, run_model, to_device
from hf_quant.diffusion.timesteps import Timed
from hf_quant.errors import UnsupportedModel
from hf_quant.plan import SitePlan
from hf_quant.products import widened
from hf_quant.report import Entry
from hf_quant.runtime.clock import CLASSES, NAME
from hf_quant.runtime.install import install_linear
from hf_quant.runtime.linear import QuantLinear
from hf_quant.solve import relative_error
from hf_quant.stages.sampler import Batch
from hf_quant.stages.tuner import Call, Chain, Example, Fitted, Tuner, Unit, UnitLoss

Run = Callable[[int], Any]  # runs what a unit lies in on micro-batch i
CPU = torch.device("cpu")


def fitted(module: nn.Module) -> Fitted:
    """What an installed layer holds."""
    assert isinstance(module, QuantLinear)  # noqa: S101  the solver has been there
    tensors, inputs = module.packed_tensors(), module.layer.inputs
    q = module.format.unpack(tensors, module.layer)
    if inputs is None or inputs.range == "dynamic":
        return Fitted(q, inputs)
    zero = tensors["input_zero_point"].float().reshape(-1, 1) if inputs.zero == "int" else None
    return Fitted(q, inputs, (tensors["input_scale"].float().reshape(-1, 1), zero))


@contextmanager
def floating(model: nn.Module, sites: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Inside, the float layers stand where quantized ones do; gives those, by name."""
    quantized = {name: model.get_submodule(name) for name in sites}
    for name, module in sites.items():
        model.set_submodule(name, module)
    try:
        yield quantized
    finally:
        for name, module in quantized.items():
            model.set_submodule(name, module)


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """Where a unit lies: runs it on both paths.

    Attributes:
        model: holds every site by name.
        floats: the float layers of all sites that full precision means.
        run: one micro-batch on the quantized path.
        run_fp: one in full precision, called while every layer is float.
        batches: for gradients of the whole model.
        device: where the unit is computed.
        timed: the clock that tables of input ranges read, where there are any.
    """

    model: nn.Module
    floats: Mapping[str, nn.Module]
    run: Run
    run_fp: Run
    batches: Sequence[Batch]
    device: torch.device
    timed: Timed | None = None

    def examples(self, unit: Unit, loss: UnitLoss, seed: int) -> list[Example]:
        """The unit's cached micro-batches, on the CPU. The unit must be float already."""
        if unit.calls is not None:
            with floating(self.model, self.floats), torch.no_grad(), widened():
                calls = [to_device(call, self.device) for call in unit.calls]
                targets = [loss.remember(first_tensor(unit.module(*a, **k))).to(CPU) for a, k in calls]
            found = [Example(call, call, target) for call, target in zip(unit.calls, targets, strict=True)]
            if self.timed is None:
                return found
            clock = self.timed.clock
            moments = [(k[NAME], k.get(CLASSES)) for _, k in unit.calls]
            return [
                replace(e, entry_B=clock.nearest(m[0]), enter=partial(clock.set_to, *m))
                for e, m in zip(found, moments, strict=True)
            ]
        count = len(self.batches)
        calls = [_watch(unit, partial(self.run, i), None)[0] for i in range(count)]
        with floating(self.model, self.floats):
            seen = [_watch(unit, partial(self.run_fp, i), loss) for i in range(count)]
            weights: list[Tensor | None] = [None] * count
            if loss.gradients:
                weights = [_squared_gradient(self.model, unit, b, seed + i) for i, b in enumerate(self.batches)]
        found = []
        enters = [None if self.timed is None else partial(self.timed.set_to, i) for i in range(count)]
        for call, (fp_call, target), weight, batch, enter in zip(
            calls, seen, weights, self.batches, enters, strict=True
        ):
            assert target is not None  # noqa: S101  the unit ran
            _refuse_other_tokens(unit, call, fp_call)
            found.append(Example(call, fp_call, target, weight, batch.get("@" + NAME), enter))
        return found


def tune(
    unit: Unit, tuner: Tuner, around: Surroundings, plans: Mapping[str, SitePlan], seed: int
) -> dict[str, tuple[float, float]]:
    """Fit one unit, whose sites hold what the solver gave, and install the result: (weight error, seconds) by site."""
    started = time.perf_counter()
    with floating(around.model, unit.sites) as quantized:
        start = {name: fitted(module) for name, module in quantized.items()}
        examples = around.examples(unit, tuner.loss, seed)
        home = next(unit.module.parameters()).device
        unit.module.to(around.device)
        ended = tuner.tune(unit, start, examples, seed)
        unit.module.to(home)
    errors = {}
    for name, end in ended.items():
        module, plan = unit.sites[name], plans[name]
        around.model.set_submodule(name, module)
        weight = module.weight
        assert isinstance(weight, Tensor)  # noqa: S101
        W_NK = weight.T if plan.site.kind == "conv1d" else weight
        errors[name] = relative_error(W_NK.detach(), end.q, (), None)
        install_linear(around.model, name, end.q, plan.format, inputs=end.inputs, input_range=end.input_range)
        if around.timed is not None:
            around.timed.give(around.model.get_submodule(name))
    each = (time.perf_counter() - started) / len(ended)
    return {name: (error, each) for name, error in errors.items()}


def updated(entries: Sequence[Entry], tuned: Mapping[str, tuple[float, float]]) -> list[Entry]:
    """The report's entries of a solver, with the error and time after tuning. The error is that of the weight."""
    result = []
    for entry in entries:
        error, seconds = tuned.get(entry.name.removesuffix(".weight"), (None, 0.0))
        if error is not None:
            spent = round((entry.seconds or 0.0) + seconds, 4)
            entry = replace(entry, error=error, error_of="weight", seconds=spent)
        result.append(entry)
    return result


def _watch(unit: Unit, run: Callable[[], Any], loss: UnitLoss | None) -> tuple[Call, Tensor | None]:
    """How the unit is called in one forward and, with a loss, what of its output is remembered."""
    parts = list(unit.module.parts) if isinstance(unit.module, Chain) else [unit.module]
    calls: list[Call] = []
    kept: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) == len(parts):
            raise UnsupportedModel(
                f"{unit.name} runs more than once in a forward, so it cannot be fitted against what it puts out; "
                "use a method without a tuner, such as gptq, there"
            )
        mine = args if not calls else args[1:]  # the others' hidden states come from the one before
        calls.append(to_device((_own(mine), kwargs), CPU))

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:  # noqa: ANN401
        if loss is not None:
            kept.append(loss.remember(first_tensor(out)).detach().to(CPU))

    handles = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    handles.append(parts[-1].register_forward_hook(after))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(parts):
        raise UnsupportedModel(
            f"{unit.name} does not run on every calibration batch (an expert without tokens, a branch not taken), so "
            "there is nothing to fit it against; use units of whole blocks, or a method without a tuner there"
        )
    call = (tuple(calls), {}) if isinstance(unit.module, Chain) else calls[0]
    return call, kept[0] if kept else None


def _own(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Blocks may write into what they are given."""
    return (args[0].detach().clone(), *args[1:]) if args and isinstance(args[0], Tensor) else args


def _refuse_other_tokens(unit: Unit, call: Call, fp_call: Call) -> None:
    shapes = [[v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor)] for args, kwargs in (call, fp_call)]
    if shapes[0] != shapes[1]:
        raise UnsupportedModel(
            f"{unit.name} sees other tokens on the quantized path than in full precision (a router decides); fit whole "
            "blocks, or use a method without a tuner there"
        )


def _squared_gradient(model: nn.Module, unit: Unit, batch: Batch, seed: int) -> Tensor:
    """Diagonal of the Fisher information at the unit's output, a sample of it: squared gradient of the log-likelihood
    of an answer drawn from the model's own prediction: labels of its logits, else a Gaussian around its output (a
    denoiser's). In full precision; its mean is 1."""
    last = unit.module.parts[-1] if isinstance(unit.module, Chain) else unit.module
    leaf: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:  # noqa: ANN401
        leaf.append(first_tensor(out).detach().requires_grad_(True))
        return leaf[-1] if isinstance(out, Tensor) else (leaf[-1], *out[1:])

    handle = last.register_forward_hook(cut)
    home = next(model.parameters()).device
    asked = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            told = run_model(model, batch, home)
            generator = torch.Generator().manual_seed(seed)
            if hasattr(told, "logits"):
                log_p = told.logits.float().log_softmax(-1).flatten(0, -2)
                drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                likelihood = log_p.gather(1, drawn).sum()
            else:  # its gradient is that of -|answer - mean|^2 / 2 with answer = mean + noise
                mean = first_tensor(told).float()
                likelihood = (mean * torch.randn(mean.shape, generator=generator).to(mean.device)).sum()
            (gradient,) = torch.autograd.grad(likelihood, leaf[0])
    finally:
        handle.remove()
        for parameter in asked:
            parameter.requires_grad_(True)
    squared = gradient.float().square()
    return (squared / squared.mean().clamp_min(1e-30)).to(CPU)
