"""Inputs with a static range for each of some timesteps."""

from dataclasses import replace

from hf_quant.errors import ConfigError
from hf_quant.spec import Spec, act_spec


def timed_inputs(act_bits: int, ranges: int, calibration_steps: int) -> Spec:
    """`ranges` ranges, each of a timestep that calibration passes through.

    Raises:
        ConfigError: there are not so many.
    """
    if type(ranges) is not int or ranges < 1:
        raise ConfigError(f"ranges={ranges!r}: timesteps with a range of their own, 1 or more")
    if type(calibration_steps) is int and ranges > calibration_steps:
        raise ConfigError(
            f"ranges={ranges} are more than the timesteps of calibration_steps={calibration_steps}: give "
            f"ranges={calibration_steps} or less, or more steps"
        )
    return replace(act_spec(act_bits, static=True, symmetric=False), index="timestep", entries=ranges)
