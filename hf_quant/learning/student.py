"""Student: a layer's weight and inputs, rounded while a model is trained, and as they were for the teacher."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_quant.errors import UnsupportedSpec
from hf_quant.qtensor import QTensor
from hf_quant.running.distributed import by_deepspeed
from hf_quant.stages.fakequant import FakeQuant, Learned
from hf_quant.stages.input_quant import InputQuant


class Student(nn.Module):
    """A parametrization that can be turned off: the weight as it was is the teacher's. Transposed for Conv1D.

    So can what rounds the layer's inputs, `inputs`, a pre-hook of the layer.

    The rounding is computed again in the backward pass: kept, its steps would take several times the weight's memory.
    """

    def __init__(self, fake: FakeQuant, inputs: InputQuant | None, transposed: bool) -> None:
        super().__init__()
        if by_deepspeed() and type(fake).before_step is not FakeQuant.before_step:
            raise UnsupportedSpec(
                f"{type(fake).__name__} changes gradients before a step (before_step), and DeepSpeed steps as soon as "
                "it has them; train with FSDP (accelerate launch --use_fsdp --fsdp_version 2) or without either"
            )
        self.fake, self.inputs, self.transposed, self.on = fake, inputs, transposed, True
        for parameter in self.parameters():
            parameter.data = parameter.data.contiguous()  # others cannot be shared out

    def learned(self) -> list[Learned]:
        """Of the weight and of the inputs."""
        return [*self.fake.learned(), *(() if self.inputs is None else self.inputs.learned())]

    def round_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook."""
        return args if self.inputs is None or not self.on else (self.inputs(args[0]), *args[1:])

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, in the type of the weight."""
        if not self.on:
            return weight
        W_NK = weight.T if self.transposed else weight
        again = torch.is_grad_enabled()
        rounded: Tensor = checkpoint(self.fake, W_NK, use_reentrant=False) if again else self.fake(W_NK)
        W_NK = rounded.to(weight.dtype)
        return W_NK.T if self.transposed else W_NK

    def export(self, module: nn.Module) -> QTensor:
        """The codes of the weight of the layer that it parametrizes."""
        weight: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        return self.fake.export(weight.T if self.transposed else weight)
