"""Squared gradients against a loss whose gradient is known; what is split into samples; what has no loss."""

import pytest
import torch
from torch import Tensor, nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.errors import CalibrationError
from hf_quant.learning.fisher import fisher_states, of_inputs, samples, squared_gradients
from hf_quant.stages.objective import Fisher, FisherMse
from hf_quant.stages.sampler import Batch
from hf_quant.stats import Gram


class Two(nn.Module):
    """`y = a x`, and a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)


class Sum:
    """`sum_n y_n`, the mean over the batch: its gradient to `a[n, k]` is x_k, averaged."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model.a(batch["x"]).sum(1).mean()


def test_each_sample_counts_for_itself() -> None:
    """Two samples with opposite gradients: their mean has none, their squares add up."""
    model, x = Two(), torch.tensor([[1.0, 2, 3, 4], [-1.0, -2, -3, -4], [0.5, 0, 0, 0]])
    model.b.weight.requires_grad_(False)
    squares = squared_gradients(model, [{"x": x[:2]}, {"x": x[2:]}], Sum(), ["a", "b"])
    assert squares["a"].equal(x.double().square().sum(0).expand(3, 4))
    assert squares["b"].equal(torch.zeros(3, 4, dtype=torch.float64))
    assert model.a.weight.grad is None
    assert (model.a.weight.requires_grad, model.b.weight.requires_grad) == (True, False)


def test_the_error_is_weighed_weight_by_weight() -> None:
    fisher = Fisher()
    square = torch.rand(5, 4, dtype=torch.float64)
    quadratic = FisherMse(fisher).quadratic({fisher: {"square": square}})
    assert quadratic.F_NK is not None
    assert quadratic.F_NK.equal(square.float())
    assert quadratic.H_KK.equal(square.mean(0).float().diag())
    assert of_inputs((fisher, Gram())) == (Gram(),)
    assert fisher_states(nn.Linear(2, 2), [], {"a": (Gram(),)}) == {}


def test_what_is_split_into_samples() -> None:
    batch = {
        "input_ids": torch.arange(6).reshape(2, 3),
        "@weight": torch.tensor([1.0, 2.0]),
        "timestep": torch.tensor(7),
    }
    first, second = samples(batch)
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    assert second["@weight"].tolist() == [2.0]
    assert first["timestep"] == second["timestep"] == 7


def test_a_model_without_a_loss_is_told_so() -> None:
    from transformers import AutoModelForImageClassification, ViTConfig

    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    config.patch_size = 4
    model = AutoModelForImageClassification.from_config(config)
    images = [{"pixel_values": torch.randn(2, 3, 8, 8)}]
    with pytest.raises(CalibrationError, match="labels"):
        hf_quant.quantize(model, QuantConfig("squeezellm"), data=images, progress=False)
    labelled = [{**images[0], "labels": torch.tensor([0, 1])}]
    report = hf_quant.quantize(model, QuantConfig("squeezellm", bits=3), data=labelled, progress=False)
    assert all(e.error_of == "weight" for e in report.quantized)
