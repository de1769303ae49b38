"""QuantConfig: validated at construction, JSON both ways, readable."""

import copy
import json
from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from hf_quant.config import VERSION, QuantConfig
from hf_quant.errors import CheckpointError, ConfigError
from hf_quant.method import _METHODS, Paper, method
from hf_quant.recipe import Recipe


def test_what_is_given_is_what_is_shown() -> None:
    config = QuantConfig("gptq", bits=3, group_size=64, damp=0.02, skip=["*.o_proj"], seed=7)
    assert repr(config) == "QuantConfig('gptq', bits=3, group_size=64, damp=0.02, skip=('*.o_proj',), seed=7)"
    assert eval(repr(config)) == config


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("rtn"),
        QuantConfig("gptq", bits=2, group_size=-1, act_order=True),
        QuantConfig("rtn", overrides={"*.down_proj": {"bits": 8}, "*.0.*": None}, allow=["x"], seed=3),
    ],
)
def test_json_both_ways(config: QuantConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert data["quant_method"] == "hf_quant"
    assert QuantConfig.from_dict(data) == config
    assert dict(config) == config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gtpq"}, "did you mean 'gptq'"),
        ({"method": None}, "needs a method"),
        ({"method": "gptq", "group_siz": 64}, "did you mean 'group_size'"),
        ({"method": "gptq", "bits": 9}, "1 to 8 bits"),
        ({"method": "gptq", "bits": 0}, "1 to 8 bits"),
        ({"method": "gptq", "group_size": 0}, "group_size=0"),
        ({"method": "rtn", "seed": "x"}, "seed"),
        ({"method": "GPTQ"}, "did you mean 'gptq'"),
        ({"method": "gptq", "modules_to_not_convert": ["lm_head"]}, "of every method: .*calibration.*skip"),
        ({"method": "gptq", "calibrations": []}, "did you mean 'calibration'"),
        ({"method": "gptq", "act_order": "no"}, "act_order='no': method 'gptq' takes true or false here"),
        ({"method": "gptq", "damp": "1%"}, "damp='1%': method 'gptq' takes a number here"),
        ({"method": "gptq", "bits": True}, "bits=True: method 'gptq' takes an integer here"),
        ({"method": "rtn", "device": "gpu"}, "device='gpu': a device of torch"),
        ({"method": "rtn", "run_dir": 5}, "run_dir=5: the path of a folder"),
        ({"method": "rtn", "skip": 3}, "skip=3: a list of globs"),
        ({"method": "rtn", "overrides": ["lm_head"]}, r"overrides=\['lm_head'\]: a dict of globs"),
        ({"method": "rtn", "overrides": {"*": 4}}, r"overrides=\{'\*': 4\}: a dict of globs"),
        ({"method": "rtn", "skip": [3]}, "skip"),
        ({"method": "rtn", "overrides": {"*": {"bit": 3}}}, "did you mean 'bits'"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**arguments)  # type: ignore[arg-type]


def test_arguments_are_of_the_types_that_the_method_names() -> None:
    @method("typed", paper=Paper(None, "none"), domains={"llm"}, claim="none")
    def build(
        rate: float = 1.0, steps: int | None = None, kind: Literal["a", 2] = "a", rest: Sequence[int] = ()
    ) -> Recipe:
        raise NotImplementedError

    typed = _METHODS.pop("typed")
    fine = {"rate": 1, "steps": None, "kind": 2, "rest": [1]}
    assert typed.arguments(fine) == fine
    for wrong in ({"rate": "1"}, {"rate": True}, {"steps": 1.0}, {"kind": "b"}, {"kind": 2.0}):
        with pytest.raises(ConfigError, match=r"takes (a number|an integer or nothing|one of 'a', 2) here"):
            typed.arguments(wrong)


def test_nothing_to_skip_or_to_override_may_be_none() -> None:
    assert QuantConfig("rtn", skip=None, allow=None, overrides=None) == QuantConfig("rtn")


def test_foreign_and_newer_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match="another library"):
        QuantConfig("rtn", quant_method="gptq")
    with pytest.raises(CheckpointError, match="newer hf-quant"):
        QuantConfig(sites=[], made_by={}, version=VERSION + 1)


def test_overrides_inherit_the_arguments_they_do_not_name() -> None:
    config = QuantConfig(
        "gptq", bits=3, group_size=32, overrides={"*.v_proj": {"bits": 8}, "*.o_proj": {"method": "rtn"}}
    )
    recipes = config.overridden()
    v, o = recipes["*.v_proj"], recipes["*.o_proj"]
    assert isinstance(v, Recipe)
    assert isinstance(o, Recipe)
    assert (v.weights.grid.bits, v.weights.block) == (8, (1, 32))
    assert v.objective is not None
    assert o.objective is None


def test_data_is_shared_and_never_saved() -> None:
    data = torch.arange(8).reshape(2, 4)
    config = QuantConfig("gptq", calibration=data)
    assert copy.deepcopy(config).calibration.data is data
    assert "calibration" not in config.to_dict()
