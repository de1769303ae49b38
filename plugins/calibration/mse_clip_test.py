"""The searched range is never worse than min-max, group by group, and is the best of its ratios."""

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.qtensor import as_blocks, from_extremes, nearest
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.range import AbsMaxRange

SPECS = [int_spec(4, 32), int_spec(3, -1), int_spec(2, 48, symmetric=True), int_spec(3, 100)]


def heavy_tailed(N: int = 40, K: int = 200) -> Tensor:
    x = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return x * x.abs()


def group_errors(W: Tensor, spec: Spec, fit: MseClip | AbsMaxRange, c: Tensor | None = None) -> Tensor:
    scale, zero = fit.fit(W, spec, c)
    error = (W - nearest(W, scale, zero, spec).dequantize()).abs().pow(2.4)
    return as_blocks(error if c is None else error * c, spec).sum(-1)


@pytest.mark.parametrize("spec", SPECS)
def test_no_group_is_worse_and_the_sum_is_better(spec: Spec) -> None:
    W = heavy_tailed()
    searched, plain = (group_errors(W, spec, fit) for fit in (MseClip(), AbsMaxRange()))
    assert (searched <= plain * 1.00001).all()
    assert searched.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_best_of_all_ratios(spec: Spec) -> None:
    """Against the search written out: every ratio tried on the whole matrix, the least error of each group kept."""
    W, c = heavy_tailed(), torch.linspace(0.1, 3, 200)
    blocks = as_blocks(W, spec)
    best = torch.full(blocks.shape[:2], torch.inf)
    for ratio in torch.linspace(1, 0.2, 100).tolist():
        scale, zero = from_extremes(blocks.amin(-1) * ratio, blocks.amax(-1) * ratio, spec)
        error = (W - nearest(W, scale, zero, spec).dequantize()).abs().pow(2.4) * c
        best = torch.minimum(best, as_blocks(error, spec).sum(-1))
    assert torch.allclose(group_errors(W, spec, MseClip(), c), best, rtol=1e-4)


def test_importance_moves_the_error_to_where_it_weighs_little() -> None:
    W, c = heavy_tailed(K=64), torch.ones(64)
    c[::4] = 100
    weighed, blind = (MseClip().fit(W, int_spec(2, 64), c), MseClip().fit(W, int_spec(2, 64)))
    errors = [(W - nearest(W, *r, int_spec(2, 64)).dequantize()).square()[:, ::4].sum() for r in (weighed, blind)]
    assert errors[0] < 0.9 * errors[1]


def test_one_ratio_is_min_max() -> None:
    W, spec = heavy_tailed(), int_spec(4, 32)
    (s, z), (t, y) = MseClip(steps=1).fit(W, spec), AbsMaxRange().fit(W, spec)
    assert z is not None
    assert y is not None
    assert s.equal(t)
    assert z.equal(y)


def test_zero_weights_and_bad_arguments() -> None:
    scale, zero = MseClip().fit(torch.zeros(4, 32), int_spec(4, 32))
    assert nearest(torch.zeros(4, 32), scale, zero, int_spec(4, 32)).dequantize().eq(0).all()
    for bad in ({"steps": 0}, {"floor": 0.0}, {"floor": 1.5}, {"power": 0.0}):
        with pytest.raises(ConfigError):
            MseClip(**bad)  # type: ignore[arg-type]


def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 3, "group_size": 64}
    ours, theirs = ([judge.kl(method, **setting)] for method in ("mse-clip", "rtn"))
    claims.order("mse-clip", "KL below rtn's, w3g64, tiny-lm", ours=ours, theirs=theirs)
