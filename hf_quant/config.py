"""QuantConfig: the one thing a user passes, to transformers and to diffusers alike."""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_quant.allocation.budget import Budget
from hf_quant.allocation.mixed import budgeted
from hf_quant.data.calibration import Calibration
from hf_quant.errors import CheckpointError, ConfigError, HfQuantError
from hf_quant.method import COMMON, method_named
from hf_quant.recipe import HfQuantizer, Job, Recipe

T = TypeVar("T")
VERSION = 1  # of the JSON; a newer one is refused


class QuantMethod(enum.StrEnum):
    """The name both libraries dispatch on. An enum because diffusers reads `.value` and transformers takes `str`."""

    HF_QUANT = "hf_quant"


class QuantConfig(QuantizationConfigMixin):  # type: ignore[misc]  # an untyped base
    """How to quantize a model: a method, its arguments, and what to quantize with it.

    Args:
        method: id of a method; `hf_quant.list_methods()` names them all.
        bits: bits per weight; None: the method's default.
        budget: instead of `bits`: how large the model may become; bits are then chosen layer by layer. "3.2 bits" a
            quantized weight on average, or "6.5 GB" in all; or a dict of the fields of `allocation.budget.Budget`.
        group_size: weights sharing a scale along the input axis, -1 for one scale per output channel.
        calibration: list of texts, a `datasets.Dataset`, a path, token ids `[n, S]`, or model-input dicts. Not saved.
        processor: tokenizer for texts; None: the one that lies beside the model is loaded. Not saved.
        skip: globs of layers to keep in full precision.
        overrides: glob -> dict of other arguments for the layers it matches (`{"method": ...}` allowed), or None to
            keep them. The first match wins; a glob that matches nothing is an error.
        allow: globs of parameters that may stay unsupported, or be rounded to nearest when no calibration token
            reaches them. Anything not named stops the run.
        seed: of everything drawn at random.
        device: where one block at a time, or one weight without data, is computed while quantizing; None: where the
            model is. Not saved.
        run_dir: finished blocks are kept here, so a killed run resumes. Not saved.
        arguments: the method's own arguments, as in its signature.

    Raises:
        ConfigError: an unknown method or argument (with the nearest name), or a value out of range.

    Example:
        >>> QuantConfig("rtn", bits=4, group_size=64)
        QuantConfig('rtn', bits=4, group_size=64)
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        bits: int | None = None,
        budget: "str | Mapping[str, Any] | Budget | None" = None,
        group_size: int | None = None,
        calibration: Any = None,  # noqa: ANN401
        processor: Any = None,  # noqa: ANN401
        skip: Sequence[str] | None = (),
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        allow: Sequence[str] | None = (),
        seed: int = 0,
        device: str | torch.device | None = None,
        run_dir: str | Path | None = None,
        quant_method: str | None = None,
        version: int = VERSION,
        sites: Any = None,  # noqa: ANN401
        made_by: Mapping[str, Any] | None = None,
        sealed: int | None = None,
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        _check_origin(quant_method, version)
        if made_by is not None and not isinstance(made_by, Mapping):
            raise CheckpointError(f"quantization_config is damaged: made_by is {made_by!r}, not an object")
        self.quant_method = QuantMethod.HF_QUANT
        self.version = version
        self.sites = sites
        self.sealed = sealed  # config_crc of a saved model whose files carry checksums
        self.made_by = dict(made_by) if made_by is not None else None
        if sites is not None:  # a saved model: everything needed to load it is in `sites`
            method, bits, budget, group_size, arguments = (made_by or {}).get("method"), None, None, None, {}
        elif method is None:
            raise ConfigError('QuantConfig needs a method, for example QuantConfig("gptq", bits=4)')
        self.method = method
        self.bits, self.group_size = bits, group_size
        self.budget = None if budget is None else Budget.read(budget)
        self.skip, self.allow = _globs("skip", skip), _globs("allow", allow)
        self.overrides = _overrides(overrides)
        self.seed = seed
        self.arguments = dict(arguments)
        self.calibration = Calibration(calibration, processor)  # a handle: never copied, never saved
        self.device = _read("device", device, torch.device, "a device of torch, such as 'cuda:0'")
        self.run_dir = _read("run_dir", run_dir, Path, "the path of a folder")
        if sites is None:
            if not isinstance(seed, int):
                raise ConfigError(f"seed={seed!r}: an integer")
            self.quantizer()
            self.overridden()

    @property
    def given(self) -> dict[str, Any]:
        """The method's arguments that were given, bits and group_size included."""
        named = {"bits": self.bits, "group_size": self.group_size}
        return {k: v for k, v in named.items() if v is not None} | self.arguments

    def quantizer(self) -> HfQuantizer:
        """The method applied to its arguments."""
        return _build(str(self.method), self.given, self.budget, beside=COMMON)

    def overridden(self) -> dict[str, Recipe | None]:
        """Glob -> recipe, in order. One without an allocator is what its layers get, whatever the others do."""
        recipes: dict[str, Recipe | None] = {}
        for pattern, other in self.overrides.items():
            if other is None:
                recipes[pattern] = None
                continue
            given = {**other}
            name = str(given.pop("method", self.method))
            inherited = self.given if name == self.method else {}
            # with a budget, a layer whose width the override names has that width, all others are chosen for
            recipe = _build(name, {**inherited, **given}, None if "bits" in given else self.budget, strict=False)
            if not isinstance(recipe, Recipe):
                raise ConfigError(
                    f"overrides[{pattern!r}]: method {name!r} is no recipe of stages, it takes whole models"
                )
            if "bits" in given:
                recipe = replace(recipe, allocator=None)
            recipes[pattern] = recipe
        return recipes

    def job(self, *, data: Any = None, processor: Any = None, progress: bool = True) -> Job:  # noqa: ANN401
        """What the quantizer is asked to do; `data` and `processor` win over the config's own."""
        return Job(
            data=data if data is not None else self.calibration.data,
            processor=processor if processor is not None else self.calibration.processor,
            seed=self.seed,
            device=self.device,
            run_dir=self.run_dir,
            overrides=self.overridden(),
            skip=self.skip,
            allow=self.allow,
            progress=progress,
        )

    @property
    def description(self) -> dict[str, Any]:
        """What `checkpoint.build_skeleton` reads, of a saved model."""
        return {"version": self.version, "sites": self.sites}

    def finished(self, sites: Any, made_by: Mapping[str, Any]) -> "QuantConfig":  # noqa: ANN401
        """The config of the quantized model: what is needed to load it, and where it came from."""
        return QuantConfig(sites=sites, made_by=made_by, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` is its inverse (calibration data, processor, device and run_dir are not saved)."""
        data: dict[str, Any] = {"quant_method": self.quant_method.value, "version": self.version}
        if self.sites is not None:
            return data | {"sites": self.sites, "sealed": self.sealed, "made_by": self.made_by}
        data |= {"method": self.method, **self.given, "seed": self.seed}
        if self.budget is not None:
            data["budget"] = self.budget.to_json()
        for name, value in (("skip", list(self.skip)), ("allow", list(self.allow)), ("overrides", self.overrides)):
            if value:
                data[name] = value
        return data

    def __iter__(self) -> Any:  # noqa: ANN401  transformers calls dict(config)
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.sites is not None:
            return f"<QuantConfig of a model quantized with {self.method!r}>"
        parts = [repr(self.method)] + [f"{k}={v!r}" for k, v in self.given.items()]
        parts += [f"budget={self.budget.to_json()!r}"] if self.budget else []
        parts += [f"{n}={v!r}" for n in ("skip", "allow", "overrides") if (v := getattr(self, n))]
        return f"QuantConfig({', '.join(parts + ([f'seed={self.seed}'] if self.seed else []))})"


def _build(
    name: str, given: dict[str, Any], budget: Budget | None, *, beside: tuple[str, ...] = (), strict: bool = True
) -> HfQuantizer:
    """`strict=False`: a method that a budget cannot steer keeps its own width."""
    found = method_named(name)
    arguments = found.arguments(given, beside)
    try:
        with torch.device("cpu"):  # where a model is loaded the default is meta, and levels are computed here
            if budget is not None and (strict or "bits" in found.signature.parameters):
                return budgeted(found, given, budget)
            built = found.build(**arguments)
    except HfQuantError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {name!r} cannot take {given}: {error}") from error
    if not isinstance(built, HfQuantizer):
        raise ConfigError(f"method {name!r} returns {type(built).__name__}, no Recipe; is a `return` missing?")
    return built


def _check_origin(quant_method: str | None, version: int) -> None:
    if quant_method not in (None, QuantMethod.HF_QUANT.value):
        raise ConfigError(f"quant_method is {quant_method!r}, not 'hf_quant': this config belongs to another library")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"quantization_config has version {version!r}, which is not a version number")
    if version > VERSION:
        raise CheckpointError(
            f"this model was saved by a newer hf-quant (checkpoint version {version}, this one reads up to {VERSION}); "
            "upgrade with: pip install -U hf-quant"
        )


def _globs(name: str, given: Any) -> tuple[str, ...]:  # noqa: ANN401  as it was given
    globs = (given,) if isinstance(given, str) else () if given is None else given
    if not isinstance(globs, Collection) or not all(isinstance(g, str) for g in globs):
        raise ConfigError(f"{name}={given!r}: a list of globs such as 'model.layers.0.*'")
    return tuple(globs)


def require_config(config: object, caller: str) -> QuantConfig:
    """The config, as what `caller` takes.

    Raises:
        ConfigError: it is none; the name of a method gets a config's parentheses in the message.
    """
    if not isinstance(config, QuantConfig):
        meant = f": write QuantConfig({config!r})" if isinstance(config, str) else ""
        raise ConfigError(f"{caller} takes a QuantConfig, not {type(config).__name__}{meant}")
    return config


def _overrides(given: Any) -> dict[str, dict[str, Any] | None]:  # noqa: ANN401  as it was given
    given = {} if given is None else given
    if not isinstance(given, Mapping) or any(not isinstance(v, Mapping | None) for v in given.values()):
        raise ConfigError(
            f"overrides={given!r}: a dict of globs such as {{'*.down_proj': {{'bits': 8}}, 'model.layers.0.*': None}}, "
            "where None keeps a layer as it is"
        )
    return {glob: None if own is None else dict(own) for glob, own in given.items()}


def _read(name: str, given: object, make: Callable[[Any], T], wanted: str) -> T | None:
    """What `make` makes of a setting that was given."""
    try:
        return None if given is None else make(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name}={given!r}: {wanted} ({error})") from None
