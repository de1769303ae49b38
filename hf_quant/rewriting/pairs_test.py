"""Pairs are found by what a block does: names here say nothing, and what only looks like a pair is none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_quant.groups import find_groups
from hf_quant.rewriting.pairs import Pair, find_pairs, link
from hf_quant.rewriting.rewrite import fold
from hf_quant.sites import Site, SiteGroup
from hf_quant.stages.transform import Diagonal

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Two value heads of width 4, each read by two query heads: tiles=False repeats heads, True all of them in turn."""

    def __init__(self, tiles: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.tiles = tiles

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.a, self.b, self.c))
        k, v = (t.repeat(1, 2, 1, 1) if self.tiles else t.repeat_interleave(2, 1) for t in (k, v))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """`kind`: gated, relu (homogeneous), gelu (not), twice (a sum reads it besides)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        if self.kind == "gated":
            return self.c(F.silu(self.a(x)) * b)
        y = self.c(F.gelu(b) if self.kind == "gelu" else F.relu(b))
        return y + b.sum(-1, keepdim=True) if self.kind == "twice" else y


class Cnn(nn.Module):
    """Convolution, batch norm, ReLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
        for tensor in (self.n.weight, self.n.bias, self.n.running_mean):
            nn.init.uniform_(tensor, 0.2, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


class Router(nn.Module):
    """Answers with two tensors, as those of transformers do with three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, logits.argmax(-1)


class Routed(nn.Module):
    """Two experts of two layers; one that no token chooses does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r = nn.Linear(16, 16), Router()
        self.b, self.c = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((16, 12), (12, 16)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        chosen, y = self.r(x)[1], torch.zeros_like(x)
        for expert, (b, c) in enumerate(zip(self.b, self.c, strict=True)):
            if (mine := chosen == expert).any():
                y[mine] = c(F.relu(b(x[mine])))
        return y


def found(block: nn.Module, reader: str, x: Tensor = X) -> Pair | None:
    torch.manual_seed(0)
    pairs = find_pairs(block.double().eval(), lambda b: b(x), [(reader,)])
    return pairs[0] if pairs else None


def keeps_the_function(block: nn.Module, pair: Pair, x: Tensor, shift: bool = False) -> None:
    """Folding random scales (and shifts) over the pair changes nothing, in float64."""
    before = block(x)
    reader = block.get_submodule(pair.readers[0])
    K = reader.weight.shape[1]
    g = torch.Generator().manual_seed(1)
    site = Site(pair.readers[0], "linear", (reader.weight.shape[0], K))
    group = SiteGroup((site,), pair.producer, pair.channels_K)
    z = torch.randn(K, generator=g, dtype=torch.float64) if shift else None
    fold(block, group, Diagonal(torch.rand(K, generator=g, dtype=torch.float64) * 4 + 0.1, z))
    assert (block(x) - before).abs().max() < 1e-10


def test_values_and_the_layer_that_reads_them() -> None:
    for tiles in (False, True):
        pair = found(block := Attention(tiles), "d")
        assert pair is not None
        assert (pair.producer, pair.head, pair.shifts) == ("c", 4, True)
        want = torch.arange(8).repeat(2) if tiles else torch.arange(8).view(2, 1, 4).expand(2, 2, 4).flatten()
        assert torch.equal(pair.channels_K, want)
        keeps_the_function(block, pair, X, shift=True)


def test_a_gated_mlp_passes_scales_through_its_ungated_half() -> None:
    pair = found(block := Mlp("gated"), "c")
    assert pair is not None
    assert (pair.producer, pair.head, pair.shifts) == ("b", 1, False)
    keeps_the_function(block, pair, X)


def test_a_homogeneous_activation_does_and_others_do_not() -> None:
    pair = found(block := Mlp("relu"), "c")
    assert pair is not None
    assert (pair.producer, pair.head, pair.shifts) == ("b", 1, False)
    keeps_the_function(block, pair, X)
    assert found(Mlp("gelu"), "c") is None


def test_a_producer_with_another_reader_is_none() -> None:
    assert found(Mlp("twice"), "c") is None


def test_a_batch_norm_is_the_producer_of_the_convolution_after_it() -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = found(block := Cnn(), "b", x)
    assert pair is not None
    assert (pair.producer, pair.head) == ("n", 1)
    keeps_the_function(block, pair, x)


def test_a_group_norm_over_channels_that_are_turned_to_the_end() -> None:
    """The attention of a U-Net: `[B, C, T]` is normed, tokens are rows of what reads it."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.b = nn.GroupNorm(4, 16), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.n(x.mT).mT)

    pair = found(Turned(), "b", torch.randn(2, 9, 16, dtype=torch.float64))
    assert pair is not None
    assert (pair.producer, pair.head) == ("n", 16)
    keeps_the_function(Turned().double(), pair, torch.randn(2, 9, 16, dtype=torch.float64))


def test_experts_that_an_altered_token_does_not_choose() -> None:
    torch.manual_seed(0)
    block = Routed().double().eval()
    readers = [(f"{layer}.{expert}",) for expert in range(2) for layer in "bc"]
    assert {(p.readers, p.producer) for p in find_pairs(block, lambda b: b(X), readers)} == {
        (("c.0",), "b.0"),
        (("c.1",), "b.1"),
    }


class Heads(nn.Module):
    """What goes into `b` is normed head by head, with gains that the heads share and a gate, or with no gains."""

    def __init__(self, gains: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 12)
        self.n = GatedNorm(4) if gains else PlainNorm()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x)
        if isinstance(self.n, GatedNorm):
            heads, x = (t.unflatten(-1, (-1, 4)) for t in (heads, x))
            return self.b(self.n(heads, x).flatten(-2))
        return self.b(self.n(heads))


class PlainNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class GatedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * F.normalize(x, dim=-1) * F.silu(gate)


def test_norms_without_a_gain_for_every_channel_that_is_read() -> None:
    site = Site("b", "linear", (12, 16))
    for gains in (True, False):
        torch.manual_seed(0)
        block = Heads(gains).double()
        groups = find_groups(block, "", [site], lambda b: b(X))
        assert groups[0].producer == "n"
        group = link(groups, block, "", lambda b: b(X))[0]
        assert group.producer == ("n" if gains else None)
        if gains:
            assert group.channels is not None
            keeps_the_function(block, Pair("n", ("b",), group.channels, False, 1), X)
