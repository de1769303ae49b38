"""ZeroQ: a novel zero shot quantization framework (arXiv:2001.00281): synthetic data, and a Pareto front of widths.

    x = argmin  sum_l ||mean_l(x) - mu_l||^2 + ||std_l(x) - sigma_l||^2        data without data, by Adam from N(0, 1)
    Omega_l(b) = KL(f(x; W) || f(x; W, l rounded to b bits));   min sum Omega_l(b_l) on the front of (bits, sum Omega)

mu_l and sigma_l are a channel's statistics behind norm l: a BatchNorm has stored them.

Shapes: x [samples, C, S, S]; mean, std, mu and sigma a vector a norm, over samples and positions.
Differs from the paper: a LayerNorm or RMSNorm stores no statistics, but it normalizes and then multiplies by gamma and
adds beta: mu = beta and sigma = |gamma|, as over channels so in every channel. Where calibration data is given its own
statistics are the targets instead, and of the data nothing but they is used. The term for the input's own mean and
deviation is taken in. Activations get static 8-bit ranges; layers that read the same tensor are one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.capture import run_model
from hf_quant.errors import CalibrationError
from hf_quant.method import Paper, method
from hf_quant.plugins.allocation.fisher import differentiable
from hf_quant.plugins.allocation.one_site import OneSiteKl
from hf_quant.plugins.allocation.search import Pareto
from hf_quant.plugins.allocation.widths import integers
from hf_quant.recipe import Recipe
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.allocator import Allocator
from hf_quant.stages.sampler import Batch, MadeUp, TextSampler

Moments = list[tuple[Tensor, Tensor]]  # (mean, std) a channel, of the input and behind every norm


@dataclass(frozen=True, slots=True)
class Distilled(MadeUp):
    """Images whose statistics behind the norms are those that the model remembers."""

    samples: int = 32
    steps: int = 200
    rate: float = 0.1

    def sample(self, data: Any, processor: Any, seed: int, model: nn.Module) -> list[Batch]:  # noqa: ANN401
        """See `Sampler.sample`; `data` may be None.

        Raises:
            CalibrationError: the model takes no images.
        """
        config: Any = getattr(model, "config", None)
        size = getattr(config, "image_size", None)
        if size is None:
            raise CalibrationError(f"{type(model).__name__} takes no images, the only data that zeroq makes up")
        shape = (self.samples, config.num_channels, *((size, size) if isinstance(size, int) else size))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)
        norms = [m for m in model.modules() if is_norm(m)]
        real = None if data is None else TextSampler().sample(data, processor, seed, model)
        with torch.no_grad():
            targets = remembered(norms, x) if real is None else moments(model, norms, real[0]["pixel_values"].to(x))
        return [{"pixel_values": self.distil(model, norms, targets, x).detach().to(next(model.parameters()).dtype)}]

    def distil(self, model: nn.Module, norms: list[nn.Module], targets: Moments, x: Tensor) -> Tensor:
        """Adam on the images, in float32 whatever the model is in: its epsilon is 0 in float16; the model is frozen."""
        with differentiable(model, []):
            x = x.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([x], lr=self.rate)
            for _ in range(self.steps):
                adam.zero_grad()
                distance(moments(model, norms, x), targets).backward()
                adam.step()
        return x


def is_norm(module: nn.Module) -> bool:
    """A norm with a gain a channel."""
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), Tensor)


def remembered(norms: list[nn.Module], x: Tensor) -> Moments:
    """What the norms promise of their outputs: BatchNorm's own beta and |gamma|, so LayerNorm's; the input N(0, 1)."""
    found = [(x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))]
    for norm in norms:
        gain: Any = norm.weight
        bias: Any = getattr(norm, "bias", None)
        found.append((x.new_zeros(gain.shape) if bias is None else bias.detach().float(), gain.detach().float().abs()))
    return found


def moments(model: nn.Module, norms: list[nn.Module], x: Tensor) -> Moments:
    """What they are, in one forward; the model's channels are last, an image's second."""
    seen: Moments = [_moments(x, 1)]

    def hook(module: nn.Module, _: Any, out: Tensor) -> None:  # noqa: ANN401
        seen.append(_moments(out, 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else -1))

    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        run_model(model, {"pixel_values": x.to(next(model.parameters()).dtype)}, x.device)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _moments(x: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    flat = x.float().movedim(channel, 0).flatten(1)
    return flat.mean(1), flat.std(1)


def distance(found: Moments, targets: Moments) -> Tensor:
    """`sum ||mean - mu||^2 + ||std - sigma||^2`, each norm's by its number of channels."""
    far: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss
    return torch.stack(
        [far(a, b) for f, t in zip(found, targets, strict=True) for a, b in zip(f, t, strict=True)]
    ).sum()


@method(
    "zeroq",
    paper=Paper("2001.00281", "ZeroQ: A Novel Zero Shot Quantization Framework"),
    domains={"vit"},
    claim="synthetic images match the norms' statistics ten times better than noise and calibrate better than it",
)
def zeroq(bits: int = 4, act_bits: int = 8, steps: int = 200) -> Recipe:
    """As large as `bits` everywhere, or as a budget says, with static activation ranges; no data is needed."""
    choices = integers(bits, -1)
    return Recipe(
        weights=int_spec(bits, -1),
        inputs=act_spec(act_bits, static=True, symmetric=False),
        sampler=Distilled(steps=steps),
        allocator=Allocator(choices, OneSiteKl(rows=32), Pareto()),
    )
