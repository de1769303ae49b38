"""Scaled gradients: float16 has nothing below 6e-8, where most gradients of a mean over thousands of tokens lie."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

SCALE = 4096.0  # a mean over some thousand tokens becomes about the sum of them, whose gradients are below one


class ScaledGradients(Trainer):  # type: ignore[misc]  # an untyped base
    """transformers' Trainer, whose gradients pass float16 layers 4096 times as large; what is learned is float32."""

    @property
    def scale(self) -> float:
        """What the loss has to be multiplied by."""
        return SCALE if any(p.dtype == torch.float16 for p in self.model.parameters()) else 1.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # noqa: ANN401
        """Forward and backward; the gradients that it leaves are of the loss as it is."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)
        return loss
