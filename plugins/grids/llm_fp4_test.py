"""LLM-FP4: tables, the fold of the shifts, the search against itself by hand, and the order of the paper."""

from dataclasses import replace

import torch

from hf_quant.errors import ConfigError
from hf_quant.grids import MiniFloatGrid
from hf_quant.plugins.grids.llm_fp4 import ClippedInputs, FormatSearch, Preshift, llm_fp4, splits
from hf_quant.qtensor import nearest
from hf_quant.stats import AbsMax, Gram, Seen, Stat, State

import pytest  # isort: skip


def test_tables_of_every_split_of_four_bits(claims) -> None:  # type: ignore[no-untyped-def]
    tables = {(g.exponent, g.mantissa): sorted(g.table().flatten()[:8].tolist()) for g in splits(4)}
    expected = {
        (1, 2): [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
        (2, 1): [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        (3, 0): [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    }
    claims.invariant("llm-fp4", "E2M1, E1M2 and E3M0 have the values of the formula", tables == expected)
    assert [g.exponent for g in splits(8)] == [1, 2, 3, 4, 5]


def states(x: torch.Tensor, *stats: Stat) -> dict[Stat, State]:
    made = {stat: stat.start(x.shape[1], x.device) for stat in stats}
    for stat, state in made.items():
        stat.update(state, Seen(x))
    return made


def test_shifts_are_powers_of_two_that_no_channel_outgrows() -> None:
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0)) * torch.exp2(-torch.arange(16.0))
    x[:, 5] = 0
    rewrite = Preshift(limit=3).propose([], states(x, AbsMax()), llm_fp4().weights, None, llm_fp4().range)
    assert rewrite is not None
    shifted = (x / rewrite.s_K).abs().amax(0)
    assert shifted.max() == x.abs().max()
    assert bool((rewrite.s_K.log2() % 1 == 0).all())
    assert rewrite.s_K.min() == 2**-3
    assert rewrite.s_K[5] == 1


def test_folding_keeps_the_function(judge, claims) -> None:  # type: ignore[no-untyped-def]
    """The loop folds and checks; here the same fold alone, seen at the logits, with weights and inputs in 8 bits."""
    from hf_quant.capture import record
    from hf_quant.groups import find_groups
    from hf_quant.rewriting.rewrite import fold
    from hf_quant.sites import find_blocks, walk

    model, ids = judge.model(outliers=True), judge.test[:2]
    with torch.no_grad():
        before = model(ids).logits
        blocks, batch = find_blocks(model), {"input_ids": ids}
        recording, device = record(model, blocks, [batch], ids.device), ids.device
        (chain,) = recording.chains
        hidden, folded = recording.starts[0][chain[0]], 0
        for name in chain:
            block, call = model.get_submodule(name), recording.calls[0][name]
            sites = [s for s in walk(model) if s.block == name]
            for group in find_groups(block, name, sites, lambda b, c=call, h=hidden: c.run(b, h, device)):
                if group.producer is not None:
                    x = torch.randn(50, group.sites[0].shape[1]) * torch.rand(group.sites[0].shape[1])
                    rewrite = Preshift(3).propose([], states(x, AbsMax()), llm_fp4().weights, None, llm_fp4().range)
                    assert rewrite is not None
                    fold(model, group, rewrite)
                    folded += 1
            hidden = call.run(block, hidden, device)
        away = float((model(ids).logits - before).abs().max())
    assert folded >= 12
    claims.invariant("llm-fp4", "folded shifts change no logit by more than 1e-4", away < 1e-4, {"away": away})


def test_the_search_takes_the_best_split() -> None:
    """Uniform weights want mantissa, heavy tails want exponent."""
    g = torch.Generator().manual_seed(0)
    recipe = llm_fp4()
    search = recipe.grids
    assert isinstance(search, FormatSearch)
    x = torch.randn(512, 48, generator=g)
    heavy = torch.randn(512, 48, generator=g) ** 5
    W_uniform, W_heavy = torch.rand(32, 48, generator=g) * 2 - 1, torch.randn(32, 48, generator=g) ** 5
    assert recipe.inputs is not None
    chosen = []
    for W, inputs in ((W_uniform, x), (W_heavy, heavy)):
        stats = states(inputs, *search.needs)
        weights, of_inputs = search.choose(W, stats, recipe.weights, recipe.inputs)
        errors = []
        for grid in splits(4):
            spec = replace(recipe.weights, grid=grid)
            H = stats[Gram()]["xx"].float().diagonal() * 2 / 512
            q = nearest(W, *search.clip.fit(W, spec, H), spec).dequantize()
            errors.append(float((inputs @ (q - W).T).square().sum()))
        assert splits(4)[errors.index(min(errors))] == weights.grid
        assert of_inputs is not None
        chosen.append((weights.grid, of_inputs.grid))
        scale, zero = ClippedInputs(search.clip).fit_inputs(stats, of_inputs)
        assert scale.shape == (1, 1)
        assert zero is None
    assert chosen[0][0] == MiniFloatGrid(1, 2)
    assert chosen[1] == (MiniFloatGrid(3, 0), MiniFloatGrid(3, 0))


def test_widths_that_leave_no_choice_are_refused() -> None:
    for given in ({"bits": 2}, {"act_bits": 9}, {"act_bits": 2.5}):
        with pytest.raises(ConfigError, match="3 to 8"):
            llm_fp4(**given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    shifted = [judge.kl("llm-fp4", outliers=True, seed=s) for s in range(3)]
    plain = [judge.kl("llm-fp4", preshift=False, outliers=True, seed=s) for s in range(3)]
    integers = [judge.kl("int8-default", bits=4, act_bits=4, outliers=True, seed=s) for s in range(3)]
    claims.order("llm-fp4", "W4A4 with outliers: shifted exponents below none", ours=shifted, theirs=plain)
    claims.order("llm-fp4", "W4A4 with outliers, no shifts: below 4-bit integers a tensor", ours=plain, theirs=integers)
