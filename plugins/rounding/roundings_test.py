"""What every Rounding owes: it begins at the solver's codes, and once hard it computes what it exports, to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hf_quant.grids import IntGrid
from hf_quant.plugins.rounding.adaround import AdaRound
from hf_quant.plugins.rounding.discquant import Between
from hf_quant.plugins.rounding.flexround import FlexRound
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.gsq import Gumbel
from hf_quant.plugins.rounding.lrq import Lrq
from hf_quant.plugins.rounding.lsq_ptq import Places
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.fakequant import FakeQuant, Rounding
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.reconstruction import Mse, Reconstruction
from hf_quant.stages.solver import Nearest
from hf_quant.stages.tuner import Example, Fitted, Unit

ROUNDINGS: dict[str, Rounding] = {
    "adaround": AdaRound(lr=0.05),
    "discquant": Between(lr=0.02, rho=20.0),
    "flexround": FlexRound(lr=0.02),
    "gsq": Gumbel(lr=3e-3),
    "lrq": Lrq(lr=0.02),
    "lsq-ptq": Places(lr=0.02),
}
SPECS = {
    "groups": int_spec(3, 16),
    "ragged groups": int_spec(2, 10, symmetric=True),
    "rows": int_spec(4),
    "tensor": Spec(grid=IntGrid(8), block=(-1, -1), zero="int"),
}
every = pytest.mark.parametrize("rounding", ROUNDINGS)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def matrix() -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs of it."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 32, generator=g), torch.randn(64, 32, generator=g) @ torch.randn(32, 32, generator=g) / 5


def solved(spec: Spec) -> QTensor:
    W, x = matrix()
    if spec.block[0] == 1:  # off the nearest codes in places
        return Gptq().solve(W, spec, AbsMaxRange(), Quadratic(2 / len(x) * x.T @ x))
    return Nearest().solve(W, spec, AbsMaxRange(), None)


def fake(rounding: str, q: QTensor) -> FakeQuant:
    return ROUNDINGS[rounding].start(matrix()[0], q, torch.Generator().manual_seed(0))


def same(a: QTensor, b: QTensor) -> bool:
    zeros = a.zero is b.zero is None or (a.zero is not None and b.zero is not None and a.zero.equal(b.zero))
    return a.codes.equal(b.codes) and a.scale.equal(b.scale) and zeros


@contextmanager
def learning(rounding: str, spec: Spec, **how: float) -> Iterator[tuple[Reconstruction, Unit, dict, list[Example]]]:
    """One linear layer as a unit, aimed at its float outputs from inputs a little off."""
    W, x = matrix()
    layer = nn.Linear(32, 12, bias=False)
    layer.weight.data.copy_(W)
    parts = x.split(16)
    examples = [Example(((p * 1.02,), {}), ((p,), {}), p @ W.T) for p in parts]
    yield (
        Reconstruction(ROUNDINGS[rounding], **how),
        Unit("layer", layer, {"layer": layer}),
        {  # type: ignore[arg-type]
            "layer": Fitted(Nearest().solve(W, spec, AbsMaxRange(), None))
        },
        examples,
    )
    assert layer.weight.equal(W)
    assert type(layer) is nn.Linear
    assert layer.weight.requires_grad


@every
@each_spec
def test_it_begins_at_what_the_solver_gave(rounding: str, spec: Spec) -> None:
    q = solved(spec)
    assert same(fake(rounding, q).export(matrix()[0]), q)


@every
@each_spec
def test_hard_it_computes_what_it_exports(rounding: str, spec: Spec) -> None:
    """After some learning, and learning goes on afterwards."""
    W, x = matrix()
    learned = fake(rounding, solved(spec))
    parameters = [{"params": [p], "lr": lr} for p, lr in learned.learned()]
    optimizer = torch.optim.Adam(parameters)
    for step in range(6):
        penalty = learned.anneal(step / 6)
        loss = (x @ (learned(W) - W).T).square().mean() + (0 if penalty is None else penalty)
        optimizer.zero_grad()
        loss.backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p, _ in learned.learned())
        learned.before_step()
        optimizer.step()
        learned.after_step()
        learned.anneal(1.0)
        q = learned.export(W)
        assert learned(W).equal(q.dequantize())
        assert q.spec == spec
        assert q.codes.equal(spec.grid.encode(spec.grid.decode(q.codes)))  # on the grid
        assert q.scale.equal(spec.scale.decode(spec.scale.encode(q.scale)))


@every
def test_it_lowers_the_error_and_never_ends_worse_than_it_began(rounding: str, claims) -> None:  # type: ignore[no-untyped-def]
    spec = SPECS["groups"]

    def error(q: QTensor, examples: list[Example]) -> float:
        return sum(float(Mse().loss(e.call[0][0] @ q.dequantize().T, e.target, None)) for e in examples)

    with learning(rounding, spec, steps=200) as (tuner, unit, start, examples):
        before, after = (error(end["layer"].q, examples) for end in (start, tuner.tune(unit, start, examples, 0)))
    assert after < 0.98 * before
    for steps, seed in ((0, 0), (1, 0), (2, 1), (5, 2)):
        with learning(rounding, spec, steps=steps) as (tuner, unit, start, examples):
            ended = tuner.tune(unit, start, examples, seed)["layer"].q
            claims.invariant(
                rounding,
                f"never worse than its start on the data ({steps} steps)",
                error(ended, examples) <= error(start["layer"].q, examples) * (1 + 1e-6),
                {"before": error(start["layer"].q, examples), "after": error(ended, examples)},
            )


@every
def test_the_same_seed_gives_the_same_codes(rounding: str) -> None:
    ended = []
    for seed in (3, 3, 4):
        with learning(rounding, SPECS["groups"], steps=40, share=0.5) as (tuner, unit, start, examples):
            ended.append(tuner.tune(unit, start, examples, seed)["layer"].q)
    assert same(ended[0], ended[1])
    assert not same(ended[0], ended[2])


@every
def test_what_it_cannot_round_onto_is_refused(rounding: str) -> None:
    from hf_quant.grids import LevelGrid

    assert ROUNDINGS[rounding].refuses(int_spec(3, 16)) is None
    assert "integer" in str(ROUNDINGS[rounding].refuses(Spec(grid=LevelGrid((-1.0, 0.0, 1.0)))))
    assert "zero" in str(ROUNDINGS[rounding].refuses(Spec(grid=IntGrid(4), zero="float")))
