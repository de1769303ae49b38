"""InputQuant: a layer's input, rounded as it will be while a model runs; of a static range the step can be learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.runtime.activation import fake_quantize, pack_input, round_by_entry, timed
from hf_quant.stages.fakequant import Clipped, Learned, bounds, exactly
from hf_quant.stages.tuner import Fitted


class InputQuant(nn.Module):
    """A layer's input as it will be rounded; of a static range, the step `s = s_0 exp(r)` is learned (LSQ).

    A table has a step for each of its entries; `entry_B` are those of the samples that run now.
    """

    def __init__(self, fitted: Fitted, share: float, lr: float, generator: torch.Generator) -> None:
        super().__init__()
        assert fitted.inputs is not None  # noqa: S101
        self.spec, self.range, self.share, self.lr = fitted.inputs, fitted.input_range, share, lr
        self.generator = generator
        device = None if self.range is None else self.range[0].device
        self.r = nn.Parameter(torch.zeros(self.spec.entries, 1, device=device))
        self.entry_B: Tensor | None = None

    def fitted(self) -> tuple[Tensor, Tensor | None] | None:
        """The range it has come to."""
        return None if self.range is None else (self.range[0] * self.r.detach().exp(), self.range[1])

    def learned(self) -> Sequence[Learned]:
        """The step, when the range is static."""
        return [] if self.range is None or not self.lr else [(self.r, self.lr)]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` rounded; while training, each value only with probability `share`."""
        x_TK = x.reshape(-1, x.shape[-1])
        if self.range is None:
            soft, hard = x_TK.float(), fake_quantize(x_TK.detach(), self.spec, {})
        else:
            zero, s = self.range[1], self.range[0] * self.r.exp()
            if timed(self.spec):
                assert self.entry_B is not None  # noqa: S101  the examples have it
                entry_T = self.entry_B.to(s.device).repeat_interleave(len(x_TK) // len(self.entry_B))
                hard = round_by_entry(x_TK.detach(), self.spec, pack_input(s, zero), entry_T)
                s, zero = s[entry_T], None if zero is None else zero[entry_T]
            else:
                hard = fake_quantize(x_TK.detach(), self.spec, pack_input(s, zero))
            at = x_TK.float() / s + (0 if zero is None else zero)
            soft = (Clipped().round(at, *bounds(self.spec)) - (0 if zero is None else zero)) * s
        out = exactly(soft.to(x.dtype), hard)
        if self.training and self.share < 1:
            kept = torch.rand(out.shape, generator=self.generator) < self.share
            out = torch.where(kept.to(x.device), out, x_TK)
        return out.reshape(x.shape)

    def place(self, module: nn.Module, convolutions: Mapping[nn.Module, nn.Module]) -> nn.Module:
        """Whose input to round: with one range for all, that of the convolution whose matrix `module` is."""
        return module if self.range is None else convolutions.get(module, module)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook."""
        return self(args[0]), *args[1:]
