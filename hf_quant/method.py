"""The registry of methods. A method is a function from its published parameters to an `HfQuantizer`."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hf_quant.errors import ConfigError
from hf_quant.installed import broken, brought
from hf_quant.recipe import HfQuantizer

DOMAINS = frozenset({"llm", "vit", "vlm", "moe", "mamba", "diffusion"})
_METHODS: dict[str, "Method"] = {}
# What `QuantConfig` takes of every method, for those who look for `dataset`, `ignore` or `modules_to_not_convert`.
COMMON = ("budget", "calibration", "processor", "skip", "overrides", "allow", "seed", "device", "run_dir")
TAKEN = {"method", "quant_method", "version", "sites", "made_by", "sealed", *COMMON}  # names of its own parameters


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published: arXiv number (or None for folklore baselines) and title."""

    arxiv: str | None
    title: str

    @property
    def url(self) -> str | None:
        """Link to the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method: its id, paper, what it is for, the claim its test shows, and its parameters."""

    id: str
    paper: Paper
    domains: frozenset[str]
    claim: str
    build: Callable[..., HfQuantizer]

    @property
    def signature(self) -> inspect.Signature:
        """The method's configuration: its parameters and their defaults."""
        return inspect.signature(self.build)

    def arguments(self, given: dict[str, Any], beside: tuple[str, ...] = ()) -> dict[str, Any]:
        """`given` completed with the defaults; `beside` are the names that whoever asks takes itself.

        Raises:
            ConfigError: an unknown argument (with the nearest name), a missing one, or a value of another type.
        """
        known = self.signature.parameters
        try:
            kinds = get_type_hints(self.build)
        except NameError as error:
            raise ConfigError(f"an annotation of method {self.id!r} cannot be read: {error}") from None
        for name, value in given.items():
            if name not in known:
                others = f"; of every method: {', '.join(beside)}" if beside else ""
                raise ConfigError(
                    f"method {self.id!r} has no argument {name!r}{did_you_mean(name, [*known, *beside])}; "
                    f"it takes: {', '.join(known) or 'none'}{others}"
                )
            if name in kinds and not _fits(value, kinds[name]):
                raise ConfigError(f"{name}={value!r}: method {self.id!r} takes {_in_words(kinds[name])} here")
        bound = {n: given.get(n, p.default) for n, p in known.items()}
        missing = [n for n, v in bound.items() if v is inspect.Parameter.empty]
        if missing:
            raise ConfigError(f"method {self.id!r} needs the argument(s) {', '.join(missing)}")
        return bound


def did_you_mean(name: str, known: Any) -> str:  # noqa: ANN401  any iterable of names
    """`, did you mean 'x'?` or nothing."""
    lowered = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), lowered, n=1)
    return f", did you mean {lowered[close[0]]!r}?" if close else ""


def _fits(value: object, kind: Any) -> bool:  # noqa: ANN401  an annotation
    """Whether a value is of the annotated type; one that is not looked into here takes all."""
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(kind))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _in_words(kind: Any) -> str:  # noqa: ANN401  an annotation
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    words: dict[Any, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        NoneType: "nothing",
    }
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def method(
    method_id: str, *, paper: Paper, domains: set[str], claim: str
) -> Callable[[Callable[..., HfQuantizer]], Callable[..., HfQuantizer]]:
    """Register the decorated function as a method. Its parameters, all with defaults, are its configuration.

    Args:
        method_id: the name users pass to `QuantConfig`; lower case, words joined by "-".
        paper: where it was published.
        domains: subset of `DOMAINS` it is known to work on.
        claim: one sentence, checked by the claim test beside the method.
    """
    if not isinstance(method_id, str) or not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", method_id):
        raise ConfigError(f"method {method_id!r}: an id is in lower case, its words joined by '-'")
    if not isinstance(paper, Paper):
        raise ConfigError(f'method {method_id!r}: paper={paper!r}: a Paper("2210.17323", "Its title")')
    if not isinstance(domains, set | frozenset) or not domains <= DOMAINS:
        raise ConfigError(f"method {method_id!r}: domains={domains!r}: a set of {sorted(DOMAINS)}")

    def register(build: Callable[..., HfQuantizer]) -> Callable[..., HfQuantizer]:
        for parameter in inspect.signature(build).parameters.values():
            if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise ConfigError(f"method {method_id!r}: {parameter} is no parameter with a name of its own")
            if parameter.name in TAKEN:
                raise ConfigError(
                    f"method {method_id!r}: {parameter.name} is a parameter of every QuantConfig; rename it"
                )
        present = _METHODS.get(method_id)
        if present is not None and present.build.__module__ != build.__module__:
            raise ConfigError(
                f"method {method_id!r} is registered twice: {present.build.__module__} and {build.__module__}"
            )
        _METHODS[method_id] = Method(method_id, paper, frozenset(domains), claim, build)
        return build

    return register


@cache
def _load() -> None:
    """Import every built-in method and every installed third-party one (entry point group `hf_quant.methods`)."""
    import hf_quant.plugins as package

    for family in pkgutil.iter_modules(package.__path__, "hf_quant.plugins."):
        if family.ispkg:
            for module in pkgutil.iter_modules(importlib.import_module(family.name).__path__, family.name + "."):
                if not module.name.endswith(("_test", "_core", "conftest")):
                    importlib.import_module(module.name)
    brought("hf_quant.methods", lambda module: module)


def list_methods() -> list[Method]:
    """Every method, by id."""
    _load()
    return [_METHODS[k] for k in sorted(_METHODS)]


def method_named(method_id: str) -> Method:
    """The method with this id.

    Raises:
        ConfigError: no such method (with the nearest name).
    """
    _load()
    if method_id not in _METHODS:
        known = sorted(_METHODS)
        raise ConfigError(
            f"unknown method {method_id!r}{did_you_mean(str(method_id), known)}; known: {', '.join(known)}"
            + broken("hf_quant.methods")
        )
    return _METHODS[method_id]
