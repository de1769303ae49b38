"""QDrop: what is dropped, what is rounded in the end, and its claims on a trained model."""

import pytest
import torch
from torch import Tensor, nn

from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.runtime.activation import fake_quantize, pack_input
from hf_quant.spec import act_spec, int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.reconstruction import InputQuant, Mse, Reconstruction
from hf_quant.stages.solver import Nearest
from hf_quant.stages.tuner import Example, Fitted, Unit

INPUTS = act_spec(4, static=True, symmetric=False)


def fitted() -> tuple[Tensor, Tensor, Fitted]:
    """A weight, inputs of it, and where they begin."""
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(12, 32, generator=g), torch.randn(64, 32, generator=g)
    q = Nearest().solve(W, int_spec(4), AbsMaxRange(), None)
    step = (x.amax() - x.amin()).reshape(1, 1) / 15
    return W, x, Fitted(q, INPUTS, (step, (-x.amin() / step).round()))


def test_invariant_each_value_is_rounded_with_its_probability(claims) -> None:  # type: ignore[no-untyped-def]
    _, x, begun = fitted()
    assert begun.input_range is not None
    rounded = fake_quantize(x, INPUTS, pack_input(*begun.input_range))
    shares = []
    for share in (0.0, 0.5, 1.0):
        quant = InputQuant(begun, share, 1e-3, torch.Generator().manual_seed(1))
        out = quant(x)
        assert bool(((out == rounded) | (out == x)).all())
        shares.append(float((out == rounded).float().mean()))
        assert quant.eval()(x).equal(rounded)  # in the end all of them are, as at run time
    holds = shares[0] < 0.01 and abs(shares[1] - 0.5) < 0.03 and shares[2] == 1.0
    claims.invariant(
        "qdrop", "each value of an input is rounded with probability p, in the end every one", holds, {"shares": shares}
    )


def test_invariant_nothing_is_dropped_at_p_1(claims) -> None:  # type: ignore[no-untyped-def]
    """The same codes, whatever full precision the other path carries; below 1 that is mixed in."""

    def ended(share: float, other: float) -> Tensor:
        W, x, begun = fitted()
        layer = nn.Linear(32, 12, bias=False)
        layer.weight.data.copy_(W)
        examples = [Example(((p,), {}), ((p * other,), {}), p @ W.T) for p in x.split(16)]
        tuner = Reconstruction(AdaRound(lr=0.05), steps=40, share=share, input_lr=1e-3)
        return tuner.tune(Unit("layer", layer, {"layer": layer}), {"layer": begun}, examples, 0)["layer"].q.codes

    holds = ended(1.0, 1.0).equal(ended(1.0, 3.0))
    claims.invariant("qdrop", "p = 1 is reconstruction on the quantized path alone", holds)
    assert not ended(0.5, 1.0).equal(ended(0.5, 3.0))


def test_invariant_never_worse_than_its_start(claims) -> None:  # type: ignore[no-untyped-def]
    """With every input rounded, weights and steps together."""
    W, x, begun = fitted()
    examples = [Example(((p,), {}), ((p,), {}), p @ W.T) for p in x.split(16)]

    def error(of: Fitted) -> float:
        assert of.input_range is not None
        rounded = [fake_quantize(e.call[0][0], INPUTS, pack_input(*of.input_range)) for e in examples]
        return sum(
            float(Mse().loss(r @ of.q.dequantize().T, e.target, None)) for r, e in zip(rounded, examples, strict=True)
        )

    for steps in (0, 1, 5, 200):
        layer = nn.Linear(32, 12, bias=False)
        layer.weight.data.copy_(W)
        tuner = Reconstruction(AdaRound(lr=0.05), steps=steps, share=0.5, input_lr=1e-2)
        ended = tuner.tune(Unit("layer", layer, {"layer": layer}), {"layer": begun}, examples, 0)["layer"]
        figures = {"before": error(begun), "after": error(ended)}
        claims.invariant(
            "qdrop",
            f"never worse than its start on the data ({steps} steps)",
            figures["after"] <= figures["before"] * (1 + 1e-6),
            figures,
        )
    assert figures["after"] < 0.8 * figures["before"]


SETTING = {"bits": 4, "act_bits": 4}


def test_claim_in_few_steps(judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = judges("digits-vit")
    ours, start = (judge.kl("qdrop", steps=steps, **SETTING) for steps in (30, 0))
    claims.order("qdrop", "KL at most 0.6 of its start's, digits-vit, W4A4", ours=[ours], theirs=[start], factor=0.6)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "steps"), [(4, 60), (2, 300)])
def test_claim(bits: int, steps: int, judges, claims) -> None:  # type: ignore[no-untyped-def]
    """The same learning without dropping, over three calibration sets of 32 pictures that share nothing. At 2 bits a
    row 60 steps leave both worse than where they began, and dropping learns slower."""
    judge = judges("digits-vit")
    ours, plain = (judge.kls("qdrop", bits=bits, act_bits=4, steps=steps, share=share) for share in (0.5, 1.0))
    statement = f"KL below the same learning's without dropping, digits-vit, W{bits}A4, {steps} steps"
    claims.order("qdrop", statement, ours=ours, theirs=plain)
