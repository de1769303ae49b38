"""BRECQ: its weights tell which errors cost, and its claims on trained models. See also `roundings_test.py`."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hf_quant.capture import first_tensor
from hf_quant.learning.tuning import Surroundings
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.qtensor import QTensor
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.reconstruction import FisherMse, Mse, Reconstruction
from hf_quant.stages.sampler import Batch
from hf_quant.stages.solver import Nearest
from hf_quant.stages.tuner import Example, Fitted, Unit

SETTING = {"bits": 2, "group_size": 64}


def fisher(model: nn.Module, name: str, batches: Sequence[Batch], draws: int) -> list[Tensor]:
    """The weights of the loss, a mean over draws of the answer."""

    def run(i: int) -> None:
        model(**batches[i])

    around = Surroundings(model, {}, run, run, batches, torch.device("cpu"))
    unit = Unit(name, model.get_submodule(name), {})
    drawn = [around.examples(unit, FisherMse(), 100 * seed) for seed in range(draws)]
    return [torch.stack([e[i].weight for e in drawn]).mean(0) for i in range(len(batches))]


@torch.no_grad()
def cost(model: nn.Module, name: str, batch: Batch, noise: Tensor, seeds: int) -> float:
    """What noise of these sizes at a block's output adds to the loss: KL of classes, or half a squared error."""

    def out() -> Tensor:
        told = model(**batch)
        return told.logits.log_softmax(-1) if hasattr(told, "logits") else told.sample

    def disturb(_: nn.Module, args: tuple[Tensor, ...], kept: Tensor | tuple[Tensor, ...]) -> object:
        hidden = first_tensor(kept)
        hidden = hidden + noise * torch.randn(hidden.shape, generator=generator)
        return hidden if isinstance(kept, Tensor) else (hidden, *kept[1:])

    expected, total = out(), 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        handle = model.get_submodule(name).register_forward_hook(disturb)
        moved = out()
        handle.remove()
        kl = (expected.exp() * (expected - moved)).sum()
        total += float(kl if hasattr(model.config, "num_labels") else (moved - expected).square().sum() / 2)
    return total / seeds


@pytest.mark.parametrize("name", ["tiny-lm", "digits-dit"])
def test_invariant_the_weights_tell_which_errors_cost(name: str, judges, diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    """Second order: noise in the half of the features with large weights costs as much more as their weights say."""
    if name == "tiny-lm":
        model, block, draws = judges(name).model(), "model.layers.3", 8
        batches = [{"input_ids": judges(name).calibration[:4, :64]}]
    else:
        model, block, draws = diffusion_judges(name).model(), "transformer_blocks.1", 4
        batches = diffusion_judges(name).data(0)[::10]
    weight_C = torch.cat([w.flatten(0, -2) for w in fisher(model, block, batches, draws)]).mean(0)
    heavy = weight_C > weight_C.median()
    told = float(weight_C[heavy].sum() / weight_C[~heavy].sum())
    costs = [sum(cost(model, block, b, 0.03 * half.float(), 4) for b in batches) for half in (heavy, ~heavy)]
    found = costs[0] / costs[1]
    claims.invariant(
        "brecq",
        f"weights predict what noise costs, to a third ({name})",
        0.75 < found / told < 1.33,
        {"predicted": told, "measured": found},
    )


def test_invariant_equal_weights_are_plain_squared_error(claims) -> None:  # type: ignore[no-untyped-def]
    out, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    ours, plain = FisherMse().loss(out, target, torch.ones(3, 5, 8)), Mse().loss(out, target, None)
    claims.invariant("brecq", "with equal weights it is the squared error", bool((ours - plain).abs() < 1e-5 * plain))


def test_invariant_never_worse_than_its_start(claims) -> None:  # type: ignore[no-untyped-def]
    """In the weighed error, however few the steps."""
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(12, 32, generator=g), torch.randn(64, 32, generator=g) @ torch.randn(32, 32, generator=g) / 5
    weights = torch.rand(64, 12, generator=g).pow(8)
    examples = [
        Example(((p,), {}), ((p,), {}), p @ W.T, w / w.mean())
        for p, w in zip(x.split(16), weights.split(16), strict=True)
    ]

    def error(q: QTensor) -> float:
        return sum(float(FisherMse().loss(e.call[0][0] @ q.dequantize().T, e.target, e.weight)) for e in examples)

    begun = Nearest().solve(W, int_spec(3, 16), AbsMaxRange(), None)
    for steps in (0, 1, 3, 200):
        layer = nn.Linear(32, 12, bias=False)
        layer.weight.data.copy_(W)
        tuner = Reconstruction(AdaRound(lr=0.05), FisherMse(), steps=steps)
        ended = tuner.tune(Unit("layer", layer, {"layer": layer}), {"layer": Fitted(begun)}, examples, 0)["layer"].q
        figures = {"before": error(begun), "after": error(ended)}
        claims.invariant(
            "brecq",
            f"never worse than its start on the data ({steps} steps)",
            figures["after"] <= figures["before"] * (1 + 1e-6),
            figures,
        )
    assert figures["after"] < 0.98 * figures["before"]


def test_claim_in_few_steps(judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge = judges("digits-vit")
    ours, start = (judge.kl("brecq", steps=steps, **SETTING) for steps in (40, 0))
    claims.order("brecq", "KL at most 0.9 of its start's, digits-vit, 2 bits", ours=[ours], theirs=[start], factor=0.9)


@pytest.mark.slow
def test_claim(judges, claims) -> None:  # type: ignore[no-untyped-def]
    """A block at once against one layer after the other."""
    judge = judges("digits-vit")
    ours, layers = (
        judge.kls("brecq", steps=60, **SETTING),
        judge.kls("adaround", steps=60, layers=True, **SETTING),
    )
    claims.order("brecq", "KL below adaround's layer by layer, digits-vit, 2 bits, 60 steps", ours=ours, theirs=layers)


@pytest.mark.slow
def test_claim_diffusion(diffusion_judges, claims) -> None:  # type: ignore[no-untyped-def]
    judge, setting = diffusion_judges("digits-dit"), {"bits": 3, "group_size": 64}

    def noise(steps: int, seed: int) -> float:
        ratios = judge.sqnr("brecq", seed=seed, steps=steps, **setting)
        return sum(10 ** (-r / 10) for r in ratios) / len(ratios)

    ours, theirs = ([noise(steps, seed) for seed in range(3)] for steps in (30, 0))
    claims.order(
        "brecq",
        "noise of a step at most 0.85 of its start's, digits-dit, 3 bits",
        ours=ours,
        theirs=theirs,
        factor=0.85,
    )
