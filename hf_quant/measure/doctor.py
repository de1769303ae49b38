"""Doctor: where quantizing a model loses quality, found by switching it on and off in parts.

Weights are those the method gives (dequantized), inputs are rounded at run time, and both are switched site by site in
the float model, so that any part can be measured alone. Every figure is the mean KL to full precision on the same
held-out data. The order of examination is that of the debugging flowchart of the white paper on neural network
quantization (arXiv:2106.08295); outliers are judged by the error that is passed on and not by their size alone, and
calibration sets by how far the result depends on them.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.config import QuantConfig, require_config
from hf_quant.data import calibration
from hf_quant.data.reading import Batch
from hf_quant.errors import ConfigError, RunError
from hf_quant.measure.reference_logits import identity
from hf_quant.measure.switches import OUTLIER, Patient
from hf_quant.pipeline import apart
from hf_quant.plan import make_plan
from hf_quant.recipe import Recipe
from hf_quant.running.progress import track
from hf_quant.spec import Spec, act_spec

WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One layer, examined alone.

    Attributes:
        name: its path.
        weights: KL when only its weights are quantized.
        inputs: KL when only its inputs are.
        peak: largest input channel over the median one, each by its largest magnitude.
        kurtosis: of the inputs; 3 for a normal distribution.
        outliers: input channels beyond `OUTLIER` times the median one.
    """

    name: str
    weights: float
    inputs: float
    peak: float
    kurtosis: float
    outliers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Everything quantized up to here.

    Attributes:
        name: its path.
        error: relative squared error of the stream behind it.
        amplification: that over the error in front of it; for the first block the error itself.
    """

    name: str
    error: float
    amplification: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        perplexity: of the full-precision model; None where it predicts no next token.
        off: KL with every switch off; anything but 0 is a fault of the doctor.
        weights: KL with all weights quantized, inputs not.
        inputs: the other way round.
        both: with both.
        without_worst: with both, but the worst sites left in full precision.
        worst: those sites, worst first.
        sites: each alone.
        blocks: the error on its way through the model.
        sets: KL with weights quantized on each of several disjoint calibration sets; one for a method without data.
        outlier_channels: input channels that are outliers in at least a quarter of the sites of their width.
        verdict: sentences.
    """

    perplexity: float | None
    off: float
    weights: float
    inputs: float
    both: float
    without_worst: float
    worst: tuple[str, ...]
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    sets: tuple[float, ...]
    outlier_channels: tuple[int, ...]
    verdict: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-safe dict."""
        return asdict(self)


@torch.no_grad()
def diagnose(
    model: nn.Module,
    data: Any,  # noqa: ANN401  see QuantConfig
    config: QuantConfig,
    *,
    inputs: Spec | None = None,
    processor: Any = None,  # noqa: ANN401  a tokenizer
    window: int = 256,
    tokens: int = 1024,
    sets: int = 3,
    samples: int = 16,
    resume: Path | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Examine a full-precision model; it is left as it was.

    Args:
        model: of transformers, whose answer has logits: of the next token, or of classes.
        data: held-out texts, token ids, or batches of its inputs.
        config: how weights are quantized, and, where the method says so, inputs; with its calibration data.
        inputs: how inputs are rounded when the method leaves them alone; None: 8 bits, per token.
        processor: tokenizer for texts.
        window: tokens in a window.
        tokens: how many to measure on.
        sets: disjoint calibration sets to compare.
        samples: sequences in each; batches are divided among the sets as they are.
        resume: a file that grows by a line a figure; a killed run given the same file goes on.
        progress: show a bar with the time left.

    Raises:
        ConfigError: the method rewrites more than the weights it quantizes, so it cannot be switched in parts.
        CalibrationError: unusable data.
        RunError: `resume` belongs to another examination.
    """
    recipe = require_config(config, "diagnose").quantizer()
    if not isinstance(recipe, Recipe) or recipe.transforms:
        raise ConfigError(
            f"{config.method} rewrites the model around its layers, so they cannot be switched one by one; examine "
            "with rtn or gptq, whose verdict says whether a transform is needed"
        )
    with apart(model):
        batches = calibration.held_out(data, processor, window, tokens, model=model)
        calibration.check_inputs(batches, model)
        plan = make_plan(model, recipe, config.job())
        names = [
            n for n, p in plan.sites.items() if isinstance(getattr(model.get_submodule(n), "weight", None), Tensor)
        ]
        patient = Patient(model, batches, names, recipe.inputs or inputs or act_spec(8))
        drawn = [None] if recipe.data_free else _sets(config, processor, model, sets, samples)
        patient.weights = patient.rounded(config, drawn[0])
        key = {
            "model": identity(model),
            "config": repr(config),
            "inputs": repr(patient.spec),
            "data": calibration.fingerprint(batches),
        }
        notes = _Notes(resume, json.loads(json.dumps(key)))
        tests: dict[str, Callable[[], Any]] = {
            "perplexity": patient.perplexity,
            "off": lambda: patient.kl((), ()),
            "weights": lambda: patient.kl(names, ()),
            "inputs": lambda: patient.kl((), names),
            "both": lambda: patient.kl(names, names),
            "stream": lambda: patient.stream(plan.blocks),
            "channels": patient.channels,
        }
        for name in names:
            tests[f"weights of {name}"] = partial(patient.kl, [name], ())
            tests[f"inputs of {name}"] = partial(patient.kl, (), [name])
        for k, part in enumerate(drawn[1:], 2):
            tests[f"calibration set {k}"] = partial(patient.kl_of, config, part)
        found = {
            name: notes.of(name, test)
            for name, test in track(tests.items(), description="examining", total=len(tests), enabled=progress)
        }
        alone = {n: found[f"weights of {n}"] + found[f"inputs of {n}"] for n in names}
        worst = sorted(names, key=lambda n: -alone[n])[:WORST]
        rest = [n for n in names if n not in worst]
        without = notes.of("without the worst", lambda: patient.kl(rest, rest))
        return _conclude(
            found,
            names,
            worst,
            without,
            plan.blocks,
            [found["weights"], *(v for k, v in found.items() if k.startswith("calibration"))],
        )


def _sets(config: QuantConfig, processor: Any, model: nn.Module, sets: int, samples: int) -> list[list[Batch]]:  # noqa: ANN401
    """Disjoint calibration sets."""
    length = min(256, calibration.context_length(model) or 256)
    batches = calibration.model_inputs(
        config.calibration, processor, sets * samples, length, config.seed, min(4, samples), model
    )
    size = -(-len(batches) // sets)
    return [batches[i : i + size] for i in range(0, len(batches), size)]


class _Notes:
    """Figures in a file, a line each, so that none is measured twice."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and json.loads(lines[0]) != key:
            raise RunError(f"{path} belongs to another examination (model, data or config); delete it or name another")
        if not lines:
            path.write_text(json.dumps(key) + "\n")
        for line in lines[1:]:
            try:
                self.known |= json.loads(line)
            except json.JSONDecodeError:  # half a line, of a killed run
                path.write_text("\n".join([lines[0], *(json.dumps({k: v}) for k, v in self.known.items())]) + "\n")

    def of(self, name: str, test: Callable[[], Any]) -> Any:  # noqa: ANN401  what the test gives
        """The figure, measured unless it is known."""
        if name not in self.known:
            self.known[name] = test()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({name: self.known[name]}) + "\n")
        return self.known[name]


def _conclude(
    found: dict[str, Any],
    names: Sequence[str],
    worst: Sequence[str],
    without: float,
    blocks: Sequence[str],
    sets: list[float],
) -> Diagnosis:
    sites = tuple(
        Site(
            name=n,
            weights=found[f"weights of {n}"],
            inputs=found[f"inputs of {n}"],
            peak=found["channels"][n][0],
            kurtosis=found["channels"][n][1],
            outliers=tuple(found["channels"][n][2]),
        )
        for n in names
        if n in found["channels"]
    )
    errors = found["stream"]
    passed = tuple(
        Block(name=b, error=e, amplification=e / max(before, 1e-24) if i else e)
        for i, (b, e, before) in enumerate(zip(blocks, errors, [1.0, *errors], strict=False))
    )
    seen: dict[int, int] = {}
    for site in sites:
        for channel in site.outliers:
            seen[channel] = seen.get(channel, 0) + 1
    channels = tuple(sorted(c for c, n in seen.items() if 4 * n >= len(sites)))
    figures = {k: found[k] for k in ("perplexity", "off", "weights", "inputs", "both")}
    verdict = _verdict(figures, without, worst, sites, channels, sets)
    return Diagnosis(
        **figures,
        without_worst=without,
        worst=tuple(worst),
        sites=sites,
        blocks=passed,
        sets=tuple(sets),
        outlier_channels=channels,
        verdict=tuple(verdict),
    )


def _verdict(
    found: dict[str, float],
    without: float,
    worst: Sequence[str],
    sites: Sequence[Site],
    channels: Sequence[int],
    sets: Sequence[float],
) -> list[str]:
    """What to do, in sentences; each rests on a figure it names."""
    weights, inputs, both = found["weights"], found["inputs"], found["both"]
    said = []
    if found["off"] > 1e-6:
        said.append(f"With everything off the KL is {found['off']:.1e} and not 0: do not trust the rest.")
    blame = (
        "the weights" if weights > 2 * inputs else "the inputs" if inputs > 2 * weights else "weights and inputs alike"
    )
    said.append(f"The loss comes from {blame}: KL {weights:.4f} with weights alone, {inputs:.4f} with inputs alone.")
    if channels:
        shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        said.append(
            f"Outlier channels: {len(channels)} ({shown}) are more than {OUTLIER:g} times the median in at least a "
            f"quarter of the layers, {max(s.peak for s in sites):.0f} times at most. "
            + (
                "They cost quality: use a transform (smoothquant, awq, a rotation), or keep their inputs wide."
                if inputs > 0.2 * max(weights, 1e-12)
                else "Rounding the inputs costs little in spite of them."
            )
        )
    else:
        said.append("No outlier channels run through the model: it needs no smoothing and no rotation.")
    if both > 1e-9 and without < 0.7 * both:
        said.append(
            f"{len(worst)} layers hold {100 * (1 - without / both):.0f} % of the loss: give them more bits "
            f"({', '.join(worst)})."
        )
    elif both > 1e-9:
        said.append(
            f"The loss is spread: without its {len(worst)} worst layers the KL is still {without:.4f} of {both:.4f}."
        )
    if len(sets) > 1:
        spread = (max(sets) - min(sets)) / statistics.fmean(sets)
        said.append(
            f"Over {len(sets)} calibration sets the KL varies by {100 * spread:.0f} %: "
            + ("use more or other calibration data." if spread > 0.25 else "the calibration data does not decide.")
        )
    return said
