"""DFQ: equalized ranges, the same function, no mean error left; and its claim on rescaled channels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.plugins.transforms.dfq import BiasCorrection, Equalize, dfq
from hf_quant.qtensor import nearest
from hf_quant.recipe import Job
from hf_quant.rewriting.pairs import find_pairs
from hf_quant.rewriting.rewrite import fold
from hf_quant.sites import Site, SiteGroup
from hf_quant.spec import int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.transform import Diagonal
from hf_quant.stats import Mean, Seen
from hf_quant.testing.judge import Judge, log_probabilities


class Chain(nn.Module):
    """Three layers around ReLUs: equalizing one pair disturbs the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@torch.no_grad()
def test_ranges_meet_and_the_function_stays(claims) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    net, x = Chain().double(), torch.randn(7, 6).double()
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.weight.mul_(10 ** torch.randn(layer.out_features, 1).double())
    before, pairs = net(x), find_pairs(net, lambda m: m(x), [("b",), ("c",)])
    assert [(p.producer, p.readers) for p in pairs] == [("a", ("b",)), ("b", ("c",))]
    moved, rounds = True, 0
    while moved:
        moved, rounds = False, rounds + 1
        for p in pairs:
            one, two = net.get_submodule(p.producer), net.get_submodule(p.readers[0])
            rewrite = Equalize().pair(one.weight, [two.weight], {}, int_spec(8), None, AbsMaxRange())
            if rewrite is not None:
                site = Site(p.readers[0], "linear", tuple(two.weight.shape))  # type: ignore[arg-type]
                fold(net, SiteGroup((site,), p.producer), rewrite)
                moved = True
    gaps = [
        float((net.get_submodule(p).weight.abs().amax(1) / net.get_submodule(r).weight.abs().amax(0) - 1).abs().max())
        for p, r in (("a", "b"), ("b", "c"))
    ]
    drift = float((net(x) - before).abs().max() / before.abs().max())
    assert 1 < rounds < 50
    claims.invariant("dfq", "ranges of pairs are equal after equalization", max(gaps) < 1e-3, {"gap": max(gaps)})
    claims.invariant("dfq", "equalization leaves the function", drift < 1e-5, {"drift": drift})


def test_the_mean_error_is_gone(claims) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    x, W = torch.rand(400, 32, generator=g) + 0.5, torch.randn(12, 32, generator=g)
    q = nearest(W, *AbsMaxRange().fit(W, int_spec(3, -1)), int_spec(3, -1))
    state = Mean().start(32, x.device)
    for part in x.split(150):
        Mean().update(state, Seen(part))
    (constant,) = BiasCorrection().repair(W, q, {Mean(): state})
    error = x @ (q.dequantize() - W).T
    left, was = float((error + constant.b_N).mean(0).abs().max()), float(error.mean(0).abs().max())
    claims.invariant("dfq", "no mean error is left by rounding", left < 1e-4 * was, {"before": was, "after": left})


def rescale(model: nn.Module, seed: int) -> None:
    """Channels of very different scale between neighbouring layers, which compute the same."""
    g = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        sites = (Site("mlp.down_proj", "linear", tuple(layer.mlp.down_proj.weight.shape)),)  # type: ignore[arg-type]
        s_K = 2.0 ** torch.randint(-4, 5, (sites[0].shape[1],), generator=g)
        fold(layer, SiteGroup(sites, "mlp.up_proj"), Diagonal(s_K))


@torch.no_grad()
def rescaled_kl(judge: Judge, seed: int, *, equalize: bool) -> float:
    """KL of 8 bits with one scale a tensor, without data, after rescaling."""
    model = judge.model()
    rescale(model, seed)
    assert (log_probabilities(model, judge.test[:1]) - judge.expected[:1]).abs().max() < 1e-3
    replace(dfq(), transforms=(Equalize(),) if equalize else ()).quantize(model, Job(progress=False))
    return judge.distance(model)[0]


def test_one_rescaling(judge) -> None:  # type: ignore[no-untyped-def]
    assert rescaled_kl(judge, 0, equalize=True) < 0.2 * rescaled_kl(judge, 0, equalize=False)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """One scale a tensor, 8 bits, no data, three rescalings of a trained model."""
    ours, theirs = ([rescaled_kl(judge, seed, equalize=e) for seed in range(3)] for e in (True, False))
    statement = "W8 a tensor, channels rescaled at random, no data: KL at most a fifth of that without equalization"
    claims.order("dfq", statement, ours=ours, theirs=theirs, factor=0.2)


def test_a_model_of_unknown_inputs_asks_for_data() -> None:
    net = nn.Sequential()
    net.layers = nn.ModuleList([Chain() for _ in range(2)])  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="pass calibration data"):
        dfq().quantize(net, Job(progress=False))
