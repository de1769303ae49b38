"""GSQ: where it begins, what its samples are, its stages, and its claim on a trained model. See `roundings_test.py`."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.gsq import Gumbel, GumbelFake, StageUnits
from hf_quant.qtensor import QTensor
from hf_quant.sites import Site
from hf_quant.spec import int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange
from hf_quant.testing.judge import Judge

SETTING = {"bits": 2, "group_size": 32, "symmetric": True}


def start(bits: int = 2, seed: int = 0) -> tuple[Tensor, QTensor, GumbelFake]:
    g = torch.Generator().manual_seed(seed)
    W, x = torch.randn(8, 32, generator=g), torch.randn(64, 32, generator=g) @ torch.randn(32, 32, generator=g) / 5
    q = Gptq().solve(W, int_spec(bits, 16, symmetric=True), AbsMaxRange(), Quadratic(2 / 64 * x.T @ x))
    fake = Gumbel(lr=0.05).start(W, q, g)
    assert isinstance(fake, GumbelFake)
    return W, q, fake


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_invariant_codes_stay_on_the_grid(bits: int, claims) -> None:  # type: ignore[no-untyped-def]
    """Whatever the logits, near the ends of the grid too."""
    W, q, fake = start(bits)
    assert fake.l.shape[0] == {2: 4, 3: 8, 4: 5}[bits]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    seen = set()
    for seed in range(8):
        with torch.no_grad():
            fake.l.normal_(generator=torch.Generator().manual_seed(seed))
        fake.anneal(1.0)
        value = q.spec.grid.decode(fake.export(W).codes)
        assert fake(W).equal(fake.export(W).dequantize())
        fake.anneal(0.5)
        steps = fake(W) / q.scale.repeat_interleave(16, 1)
        assert bool(((steps > low - 1e-4) & (steps < high + 1e-4)).all())
        seen |= set(value.flatten().int().tolist())
    holds = min(seen) == low and max(seen) == high and len(seen) == high - low + 1
    claims.invariant("gsq", f"exported codes are on the grid, and reach all of it ({bits} bits)", holds)


def test_a_sample_is_of_the_distribution_its_logits_say() -> None:
    """At a low temperature a sample is a level, each as often as softmax(kappa l) has it."""
    _, q, fake = start()
    fake.anneal(0.999)  # kappa 500, tau 0.05
    with torch.no_grad():
        fake.l.copy_(torch.tensor([0.1, 0.4, 0.3, 0.2]).log()[:, None, None].expand_as(fake.l) / 499.75)
        steps = torch.stack([fake(torch.empty(0)) for _ in range(40)]) / q.scale.repeat_interleave(16, 1)
    counts = torch.stack([((steps - level).abs() < 0.5).float().mean() for level in (-2, -1, 0, 1)])
    assert torch.allclose(counts, torch.tensor([0.1, 0.4, 0.3, 0.2]), atol=0.03)


def test_it_begins_at_the_code_and_near_it() -> None:
    W, q, fake = start(4)
    assert fake.export(W).codes.equal(q.codes)
    fake.anneal(0.0)
    away = torch.stack([(fake(W) - q.dequantize()) for _ in range(20)]) / q.scale.repeat_interleave(16, 1)
    assert away.abs().max() < 2
    assert 0.02 < away.abs().mean() < 0.4  # moves, and stays about where it was


def test_attention_comes_first_then_the_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "only": nn.ModuleDict({"mixer": Block()})})
    names = [f"layers.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.out", "up", "down")]
    sites = [Site(n, "linear", (4, 4), n[:8]) for n in names] + [Site("only.mixer.up", "linear", (4, 4), "only")]
    units = StageUnits().units(model, ["layers.0", "layers.1", "only"], sites)
    assert [u.name for u in units] == ["layers.0.attn", "layers.0", "layers.1.attn", "layers.1", "only"]
    assert list(units[0].sites) == ["layers.0.attn.qkv", "layers.0.attn.out"]
    assert list(units[1].sites) == ["layers.0.up", "layers.0.down"]
    assert units[2].module is model.get_submodule("layers.1.attn")
    assert sorted(n for u in units for n in u.sites) == sorted(s.name for s in sites)


def more(judge: Judge) -> Judge:
    """Outputs of blocks, not of layers, are what it sees: a seed has 42 sequences of calibration here."""
    return replace(judge, samples=42, measured={})


@pytest.mark.slow
def test_claim_in_few_steps(judge, claims) -> None:  # type: ignore[no-untyped-def]
    judge, one = more(judge), {**SETTING, "skip": tuple(f"*layers.{i}.*" for i in (0, 1, 3, 4, 5))}
    ours, gptq = judge.kl("gsq", steps=40, lr=5e-3, **one), judge.kl("gptq", **one)
    claims.order("gsq", "KL below gptq's, one block, 2 bits in groups of 32, 40 steps", ours=[ours], theirs=[gptq])


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """Over three calibration sets that share nothing."""
    judge = more(judge)
    ours = judge.kls("gsq", steps=40, lr=5e-3, **SETTING)
    gptq, nearest = judge.kls("gptq", **SETTING), judge.kls("adaround", steps=40, **SETTING)
    claims.order("gsq", "KL below gptq's, 2 bits in groups of 32, 40 steps", ours=ours, theirs=gptq)
    claims.order("gsq", "KL below adaround's, 2 bits in groups of 32, 40 steps", ours=ours, theirs=nearest)
