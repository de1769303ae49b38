"""CrossQuant: its formula, what it becomes at alpha = 1, and its claim on a model with outlier channels."""

import pytest
import torch
from torch import nn

import hf_quant
from hf_quant import QuantConfig
from hf_quant.plugins.transforms.crossquant import crossquant
from hf_quant.runtime.activation import fake_quantize
from hf_quant.runtime.linear import QuantLinear
from hf_quant.spec import act_spec, cross_spec


def test_the_step_is_a_power_of_the_token_times_one_of_the_channel() -> None:
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 40)
    c_K = x.abs().amax(0)
    step = x.abs().amax(1, keepdim=True).pow(0.15) * c_K.pow(0.85) / 7
    want = (x / step).round().clamp(-8, 7) * step
    got = fake_quantize(x, cross_spec(4, 0.15), {"input_scale": c_K.pow(0.85)})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_alpha_one_is_rounding_a_token(judge, claims) -> None:  # type: ignore[no-untyped-def]
    same = crossquant(alpha=1.0).inputs == act_spec(8)
    a, b = judge.kl("crossquant", alpha=1.0, outliers=True), judge.kl("dynamic-w8a8", outliers=True)
    claims.invariant(
        "crossquant", "alpha = 1 is rounding a token, to the bit", same and a == b, {"ours": a, "theirs": b}
    )


def kernel(model: nn.Module, ids: torch.Tensor) -> float:
    """Percent of activations that are rounded to zero without being zero."""
    counts = torch.zeros(2)

    def see(layer: QuantLinear, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        rounded = layer.format.round_input(x, layer.packed_tensors(), layer.local_layer())
        counts.add_(torch.tensor([float(((rounded == 0) & (x != 0)).sum()), x.numel()]))

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        model(ids)
    return float(100 * counts[0] / counts[1])


def test_one_seed(judge) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 4, "act_bits": 8, "outliers": True}
    assert judge.kl("crossquant", **setting) < judge.kl("dynamic-w8a8", **setting)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Over three calibration sets, W8A8 and W4A8."""
    for bits in (8, 4):
        shares = []
        for method in ("crossquant", "dynamic-w8a8"):
            model = judge.model(outliers=True)
            config = QuantConfig(method, bits=bits, act_bits=8)
            hf_quant.quantize(model, config, data=judge.data(0), progress=False)
            shares.append(kernel(model, judge.test[:4]))
        statement = f"W{bits}A8, outlier channels: percent of activations rounded to zero below token-wise rounding's"
        claims.order("crossquant", statement, ours=shares[:1], theirs=shares[1:])
        kl = [judge.kl("crossquant", bits=bits, act_bits=8, outliers=True, seed=seed) for seed in range(3)]
        theirs = [judge.kl("dynamic-w8a8", bits=bits, act_bits=8, outliers=True)] * 3
        claims.order(
            "crossquant", f"W{bits}A8, outlier channels: KL below token-wise rounding's", ours=kl, theirs=theirs
        )
