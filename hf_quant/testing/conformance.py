"""What every method owes, whoever wrote it, as functions that raise `AssertionError`.

`hf_quant/every_method_test.py` runs them on all that is registered. A package of its own runs them on its own methods:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    def test_my_method(check, tmp_path):
        check(method_named("my-method"), tmp_path)
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError, ConfigError, HfQuantError, UnsupportedModel
from hf_quant.ledger import count_bits, true_bits
from hf_quant.method import DOMAINS, Method
from hf_quant.qtensor import without_outer
from hf_quant.recipe import HfQuantizer, Recipe
from hf_quant.report import Report
from hf_quant.running.run_dir import RunDir
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer
from hf_quant.testing.stranger import Stranger
from hf_quant.testing.subjects import SUBJECTS, Subject

Check = Callable[[Method, Path], None]

BRIEF = {
    "steps": 3,
    "block_steps": 3,
    "iterations": 3,
    "iters": 3,
    "epochs": 1,
    "rounds": 1,
    "sweeps": 1,
    "clip_steps": 3,
    "ranges": 4,
    "calibration_steps": 4,
    "rank": 2,
}  # contracts, not quality
IMPOSSIBLE: dict[str, tuple[Any, ...]] = {
    "bits": (0, 9, -3, 2.5, "4"),
    "group_size": (0, -2, 1.5, "128"),
    "damp": (0, 2.0, -0.1),
}
FORMULA = re.compile(r"=|<-|\|\||argmin|argmax")


def subjects_of(method: Method) -> list[Subject]:
    """The tiny models of its domains; the first one is looked at closely."""
    return [subject for domain, subject in SUBJECTS.items() if domain in method.domains]


def brief(method: Method) -> dict[str, Any]:
    """Arguments that make training short, and ranks such as a narrow layer has."""
    known = {name: parameter.default for name, parameter in method.signature.parameters.items()}
    return {name: min(short, known[name]) for name, short in BRIEF.items() if known.get(name) is not None}


def quantized(
    method: Method,
    subject: Subject,
    given: dict[str, Any] | None = None,
    *,
    blocks: int = 2,
    run_dir: Path | None = None,
) -> tuple[nn.Module, Report]:
    """The subject, quantized with the method's defaults, or what is given."""
    model, before = subject.model(blocks), torch.get_rng_state()
    config = QuantConfig(method.id, run_dir=run_dir, **{**brief(method), **(given or {})})
    report = hf_quant.quantize(model, config, data=subject.data(), progress=False)
    assert torch.equal(before, torch.get_rng_state()), "it draws from the global generator; make one from job.seed"
    return model, report


# ---- what it says ---------------------------------------------------------------------------------------------------


def says_what_it_is(method: Method, _: Path) -> None:
    """The header holds the paper, a formula, the shapes and the differences; the claim is a sentence."""
    header = inspect.getdoc(importlib.import_module(method.build.__module__)) or ""
    for part in ("Shapes:", "Differs from the paper:"):
        assert part in header, f"the header has no {part!r}"
    formulas = [line for line in header.splitlines() if line.startswith("    ") and FORMULA.search(line)]
    formulas += [code for code in re.findall(r"`([^`]+)`", header) if FORMULA.search(code)]
    assert formulas, "the header has no formula: an indented line, or one in backticks"
    assert method.paper.arxiv is None or f"arXiv:{method.paper.arxiv}" in header
    assert method.paper.title
    assert method.build.__doc__
    assert method.domains
    assert method.domains <= DOMAINS
    assert len(method.claim.split()) >= 4
    assert method.id == method.id.lower()


def its_signature_is_its_configuration(method: Method, _: Path) -> None:
    """Every parameter is named, typed, has a default; config and recipe are values that JSON and repr give back."""
    for parameter in method.signature.parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation is not inspect.Parameter.empty
    defaults = {n: p.default for n, p in method.signature.parameters.items()}
    assert json.loads(json.dumps(defaults)) == defaults
    config = QuantConfig(method.id, **defaults)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert eval(repr(config), {"QuantConfig": QuantConfig}) == config
    recipe, again = config.quantizer(), QuantConfig(method.id).quantizer()
    assert isinstance(recipe, HfQuantizer)
    assert recipe == again
    assert hash(recipe) == hash(again)
    assert eval(repr(recipe), vocabulary(recipe)) == recipe


def its_solver_gets_what_it_minimizes(method: Method, _: Path) -> None:
    """A recipe without an objective has a solver with no use for one: GPTQ would round to nearest and say nothing."""
    recipe = QuantConfig(method.id, **brief(method)).quantizer()
    if not isinstance(recipe, Recipe) or recipe.objective is not None or isinstance(recipe.solver, Nearest):
        return
    W_NK, H_KK, _D = correlated_layer(16, 64)
    inner, spec, _outer = without_outer(W_NK, recipe.weights)
    alone, told = (recipe.solver.solve(inner, spec, AbsMaxRange(), q) for q in (None, Quadratic(H_KK)))
    name = type(recipe.solver).__name__
    assert alone.codes.equal(told.codes), (
        f"{name} minimizes an objective, and the recipe has none: objective=LayerMse()"
    )


def vocabulary(value: object) -> dict[str, type]:
    """The classes that a value's repr names."""
    found: dict[str, type] = {}
    if is_dataclass(value):
        found[type(value).__qualname__.split(".")[0]] = type(value)
        for own in fields(value):
            found |= vocabulary(getattr(value, own.name))
    elif isinstance(value, tuple | frozenset | list):
        for item in value:
            found |= vocabulary(item)
    return found


# ---- what it refuses ------------------------------------------------------------------------------------------------


def refuses_impossible_arguments(method: Method, _: Path) -> None:
    """At construction, before any model is there."""
    for name in method.signature.parameters:
        for value in IMPOSSIBLE.get(name, ()):
            _must_raise(ConfigError, f"{name}={value!r}", partial(QuantConfig, method.id, **{name: value}))
    _must_raise(ConfigError, "an unknown argument", partial(QuantConfig, method.id, no_such_argument=1))


def refuses_before_any_work(method: Method, _: Path) -> None:
    """What it cannot do is said while planning, the model untouched; and what the plan accepts it can do."""
    subject = subjects_of(method)[0]
    model = subject.model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    nothing = QuantConfig(method.id, skip=["*"])
    _must_raise(UnsupportedModel, "a model with nothing left", lambda: hf_quant.quantize(model, nothing, data=[]))
    usual = QuantConfig(method.id, **brief(method))
    recipe = usual.quantizer()
    if isinstance(recipe, Recipe) and not recipe.data_free:
        _must_raise(CalibrationError, "no data", lambda: hf_quant.quantize(model, usual, data=[]))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for given in [g for g in _odd(method) if _planned(method, model, g)][:1]:
        changed = quantized(method, subject, given, blocks=1)[0]
        assert subject.output(changed).isfinite().all(), given


def _odd(method: Method) -> list[dict[str, Any]]:
    """Its arguments at the edge: few bits, groups that do not divide the width."""
    known = method.signature.parameters
    bits = [{"bits": b} for b in range(1, 9)] if "bits" in known else [{}]
    groups = [{"group_size": g} for g in (48, -1)] if "group_size" in known else [{}]
    return [{**b, **g} for b in bits for g in groups if b or g]


def _planned(method: Method, model: nn.Module, given: dict[str, Any]) -> bool:
    """Whether the plan takes these arguments; nothing but an error of ours may say no."""
    try:
        hf_quant.estimate(model, QuantConfig(method.id, **brief(method), **given))
    except HfQuantError:
        return False
    return True


def _must_raise(kind: type[HfQuantError], what: str, call: Callable[[], object]) -> None:
    told = ""
    try:
        call()
    except kind as error:
        told = str(error)
    assert len(told) > 10, f"{what}: no {kind.__name__} that says what is wrong, but {told!r}"


# ---- what it does ---------------------------------------------------------------------------------------------------


class _KilledError(BaseException):
    """Stands for the end of the process: nobody catches it."""


def runs_saves_and_loads(method: Method, folder: Path) -> None:
    """See `runs_saves_and_loads_at`, with a process of its own."""
    with Stranger() as stranger:
        runs_saves_and_loads_at(method, folder, stranger)


def runs_saves_and_loads_at(method: Method, folder: Path, stranger: Stranger) -> None:
    """Twice the same, though killed once; bits counted are bytes on disk; loads where there is no method."""
    subject = subjects_of(method)[0]
    model, report = quantized(method, subject)
    output = subject.output(model)
    assert output.isfinite().all()
    assert not output.equal(subject.output(subject.model())), "nothing was quantized"
    assert report.bits_per_weight == true_bits(model)
    killed_and_resumed(method, subject, folder / "run", output)
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    assert bytes_on_disk(folder / "model", model) == count_bits(model).bytes
    save_file({**subject.data()[0], "@output": output.contiguous()}, folder / "said.safetensors")
    assert stranger.verdict(folder, type(subject.model())) == {"equal": True}


def killed_and_resumed(method: Method, subject: Subject, run_dir: Path, expected: Tensor) -> None:
    """Killed after its first block it goes on from there, to the same bits."""
    save, load, resumed = RunDir.save, RunDir.load, []

    def save_and_die(self: RunDir, *given: Any) -> None:  # noqa: ANN401
        save(self, *given)
        raise _KilledError

    def load_and_tell(self: RunDir, *given: Any) -> Any:  # noqa: ANN401
        found = load(self, *given)
        resumed.append(found is not None)
        return found

    with patch.object(RunDir, "save", save_and_die), suppress(_KilledError):
        quantized(method, subject, run_dir=run_dir)
        raise AssertionError("it never kept a finished block in its run directory")
    with patch.object(RunDir, "load", load_and_tell):
        model, _ = quantized(method, subject, run_dir=run_dir)
    assert any(resumed), "the finished block was computed again"
    assert subject.output(model).equal(expected), "another run, or a resumed one, gives another model"


def _saved_names(model: nn.Module) -> set[str]:
    """Of its tensors in the files: transformers saves some models under the names they had in older versions."""
    state = model.state_dict()
    return set(revert_weight_conversion(model, dict(state)) if isinstance(model, PreTrainedModel) else state)


def bytes_on_disk(folder: Path, model: nn.Module) -> int:
    """Bytes of the tensors in the files, without the one-element tripwire that stops a library that lacks us."""
    total, known = 0, _saved_names(model)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_tensor(name)
                assert name in known or tensor.numel() == 1, f"{name} is saved and belongs to no module"
                total += tensor.numel() * tensor.element_size() if name in known else 0
    return total


def its_second_domain(method: Method, folder: Path) -> None:
    """See `every_other_domain`, which takes longer and is run before a release."""
    _domains(method, folder, subjects_of(method)[1:2])


def every_other_domain(method: Method, folder: Path) -> None:
    """A model of each domain it names is quantized, saved, and loaded back to the same bits."""
    _domains(method, folder, subjects_of(method)[2:])


@torch.no_grad()
def _domains(method: Method, folder: Path, subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        model, _ = quantized(method, subject, blocks=1)
        output = subject.output(model)
        assert output.isfinite().all(), subject.domain
        assert not output.equal(subject.output(subject.model(1))), f"{subject.domain}: nothing was quantized"
        model.save_pretrained(folder / subject.domain)  # type: ignore[operator]
        assert subject.output(subject.load(folder / subject.domain)).equal(output), subject.domain


CHECKS: tuple[Check, ...] = (
    says_what_it_is,
    its_signature_is_its_configuration,
    its_solver_gets_what_it_minimizes,
    refuses_impossible_arguments,
    refuses_before_any_work,
    runs_saves_and_loads,
    its_second_domain,
)
