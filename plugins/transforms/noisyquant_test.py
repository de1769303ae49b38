"""NoisyQuant: noise alone changes nothing, and it lowers the rounding error of heavy-tailed inputs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.formats import Layer, format_for
from hf_quant.plugins.transforms.noisyquant import FixedNoise, error
from hf_quant.runtime.install import dequantize_model
from hf_quant.runtime.linear import QuantLinear
from hf_quant.runtime.packed import refit
from hf_quant.runtime.rotating import shift_input
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stats import Rows, Seen, Stat, State

FIT, WEIGHTS = AbsMaxRange(), int_spec(8, -1, symmetric=True)


def stats_of(x_TK: Tensor) -> dict[Stat, State]:
    states = {s: s.start(x_TK.shape[1], x_TK.device) for s in FixedNoise.needs}
    for stat, state in states.items():
        stat.update(state, Seen(x_TK))
    return states


@torch.no_grad()
def test_without_rounding_nothing_changes(claims) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(40, 24).double()
    x, t = torch.randn(5, 40, generator=g).double(), torch.randn(40, generator=g).double()
    before = layer(x)
    shift_input(layer, t)
    drift = float((layer(x) - before).abs().max())
    q = refit(torch.randn(24, 40, generator=g), WEIGHTS)
    layers = [
        QuantLinear.from_qtensor(q, format_for(Layer(q.shape, q.spec)), shift=s, bias=torch.randn(24, generator=g))
        for s in (None, t.float())
    ]
    layers[1].bias.data.copy_(layers[0].bias.data)
    packed = float((layers[0](x.float()) - layers[1](x.float())).abs().max())
    figures = {"float64": drift, "packed": packed}
    claims.invariant(
        "noisyquant", "without rounding of inputs the output is unchanged", drift < 1e-10 and packed < 1e-4, figures
    )


def noisy(dtype: torch.dtype = torch.float32) -> QuantLinear:
    g = torch.Generator().manual_seed(0)
    q, inputs = refit(torch.randn(24, 40, generator=g), WEIGHTS), act_spec(8)
    fmt = format_for(Layer(q.shape, q.spec, inputs))
    return QuantLinear.from_qtensor(q, fmt, inputs=inputs, shift=torch.rand(40, generator=g), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_noise_is_saved_and_taken_out_of_what_is_written_and_dequantized(dtype: torch.dtype) -> None:
    layer, x = noisy(dtype), torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    near = {"atol": 0.1 if dtype == torch.float32 else 0.4, "rtol": 0.05}
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, **near)
    empty = QuantLinear.from_json(layer.describe(), (24, 40), kind="linear", bias=False, dtype=dtype)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    torch.testing.assert_close(dequantize_model(nn.Sequential(copy.deepcopy(layer)))(x), layer(x), **near)
    layer.weight.data = layer.dequantize() * 3
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, atol=3 * near["atol"], rtol=0.05)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


def test_heavy_tails_are_rounded_with_less_error(claims) -> None:  # type: ignore[no-untyped-def]
    """Laplace samples, 4 to 6 bits, three draws; a static range that covers them."""
    for bits in (4, 5, 6):
        ours, theirs = [], []
        for seed in range(3):
            u = torch.rand(512, 64, generator=torch.Generator().manual_seed(seed)) - 0.5
            x = -u.sign() * (1 - 2 * u.abs()).clamp_min(1e-7).log()
            inputs, stats = act_spec(bits, static=True, symmetric=False), stats_of(x)
            found = FixedNoise().online([torch.randn(8, 64)], stats, WEIGHTS, inputs, FIT)
            N_K = torch.zeros(64) if found is None else found.shift_K
            ours.append(error(x, N_K, inputs, x.min(), x.max()))
            theirs.append(error(x, torch.zeros(64), inputs, x.min(), x.max()))
        claims.order("noisyquant", f"Laplace samples at {bits} bits: error below rounding's", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """A language model with static inputs, three calibration sets: the search finds hardly any noise worth adding."""
    for bits in (6, 4):
        setting = {"bits": 8, "act_bits": bits}
        ours = [judge.kl("noisyquant", seed=seed, **setting) for seed in range(3)]
        theirs = [judge.kl("int8-default", symmetric_inputs=False, seed=seed, **setting) for seed in range(3)]
        statement = f"W8A{bits}, static, tiny-lm: KL below that without noise"
        claims.order("noisyquant", statement, ours=ours, theirs=theirs, factor=0.999, reproduced=False)


def test_statistics_and_arguments() -> None:
    assert Rows(512) in FixedNoise.needs
    with pytest.raises(ConfigError, match="steps"):
        FixedNoise(steps=0)
