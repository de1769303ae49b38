"""Timestep samplers: how many calibration samples come from each step of denoising."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hf_quant.errors import ConfigError


class TimestepSampler(Protocol):
    """Divides a number of samples among the steps of a trajectory."""

    @property
    def features(self) -> bool:
        """Whether it looks at features, so that they are recorded."""

    def counts(self, t_S: Tensor, features_SF: Tensor | None, samples: int) -> list[int]:
        """How many samples at each step; they add up to `samples`.

        Args:
            t_S: the timesteps in the order of denoising, as parts of the training's: 1 is noise, 0 the image.
            features_SF: the middle block's output at each step, of one trajectory.
            samples: how many in all.
        """


def divide(weights_S: Tensor, samples: int) -> list[int]:
    """`samples w / sum w`, rounded so that the sum is kept: the largest remainders go up, the first of equal ones."""
    exact = samples * weights_S.double() / weights_S.double().sum()
    counts = exact.floor().long()
    rest = samples - int(counts.sum())
    order = (counts - exact).argsort(stable=True)
    counts[order[:rest]] += 1
    return counts.tolist()


@dataclass(frozen=True, slots=True)
class Uniform:
    """As many from every step (Q-Diffusion, arXiv:2302.04304)."""

    features: ClassVar[bool] = False

    def counts(self, t_S: Tensor, features_SF: Tensor | None, samples: int) -> list[int]:
        """See `TimestepSampler.counts`."""
        return divide(torch.ones_like(t_S), samples)


@dataclass(frozen=True, slots=True)
class SkewedNormal:
    """`t ~ clamp(N(mean, std), 0, 1)`: more from the steps close to the image (PTQ4DM, arXiv:2211.15736).

    Every step gets the probability of the timesteps nearest to it, so no number is drawn.
    """

    mean: float = 0.4
    std: float = 0.4
    features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ConfigError(f"std={self.std!r}: above 0")

    def counts(self, t_S: Tensor, features_SF: Tensor | None, samples: int) -> list[int]:
        """See `TimestepSampler.counts`."""
        at, order = t_S.double().sort()
        inf = torch.tensor([float("inf")], dtype=torch.float64)
        edges = torch.cat([-inf, (at[1:] + at[:-1]) / 2, inf])
        below = torch.special.ndtr((edges - self.mean) / self.std)
        weights = torch.empty_like(at)
        weights[order] = below[1:] - below[:-1]
        return divide(weights, samples)


@dataclass(frozen=True, slots=True)
class DensityDiversity:
    """More from steps like many others, and from steps unlike them all (EDA-DM, arXiv:2401.04585).

        rho_t = |{t' : mean (f_t - f_t')^2 <= near}|,   v_t = sum_t' (1 - cos(f_t, f_t')),
        w_t = unit(rho_t) + diversity unit(v_t)

    `unit` maps a trajectory's smallest value to 0 and its largest to 1; f_t is the middle block's output.
    """

    near: float = 0.3
    diversity: float = 1.0
    features: ClassVar[bool] = True

    def counts(self, t_S: Tensor, features_SF: Tensor | None, samples: int) -> list[int]:
        """See `TimestepSampler.counts`."""
        assert features_SF is not None  # noqa: S101  `features` is True
        f = features_SF.double()
        squares = f.square().mean(1)
        apart = squares[:, None] + squares - 2 * f @ f.T / f.shape[1]
        density = (apart <= self.near).sum(1).double()
        direction = f / f.norm(dim=1, keepdim=True).clamp_min(1e-12)
        diversity = (1 - direction @ direction.T).sum(1)
        weights = _unit(density) + self.diversity * _unit(diversity)
        return divide(weights if bool(weights.any()) else torch.ones_like(weights), samples)


def _unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
