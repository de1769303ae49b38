"""QuantEase: the error never rises between rounding sweeps; below GPTQ's on layers and on a trained model."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError
from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.plugins.rounding.descent_core import descend
from hf_quant.plugins.rounding.gptq import Gptq
from hf_quant.plugins.rounding.quantease import CyclicDescent, quantease
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Job
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import AbsMaxRange, Range
from hf_quant.stages.solver import Nearest
from hf_quant.testing.layers import correlated_layer, output_error, same

FIT = AbsMaxRange()


def test_the_error_never_rises_between_rounding_sweeps(claims) -> None:  # type: ignore[no-untyped-def]
    """From a feasible point: what two sweeps without relaxation end in, then one more, and so on."""
    W, H, _ = correlated_layer(24, 300)
    q = CyclicDescent(1).solve(W, int_spec(3), FIT, Quadratic(H))
    errors = [output_error(W, q, Quadratic(H))]
    for _ in range(8):
        q = descend(W, q, Quadratic(H), 1)
        errors.append(output_error(W, q, Quadratic(H)))
    falls = all(b <= a * 1.000001 for a, b in itertools.pairwise(errors)) and errors[-1] < 0.99 * errors[0]
    claims.invariant("quantease", "the layer error never rises between two rounding sweeps", falls, {"errors": errors})


def test_more_sweeps_pay() -> None:
    W, H, _ = correlated_layer(48, 256, seed=1)
    few, many = (CyclicDescent(n).solve(W, int_spec(3), MseClip(24, 0.5, 2.0), Quadratic(H)) for n in (1, 24))
    assert output_error(W, many, Quadratic(H)) < 0.7 * output_error(W, few, Quadratic(H))


def test_edges() -> None:
    W, H, _ = correlated_layer(8, 96, seed=2)
    spec = int_spec(4, 32)
    white = CyclicDescent().solve(W, spec, FIT, Quadratic(torch.eye(96)))
    assert same(white, Nearest().solve(W, spec, FIT, None))
    assert same(CyclicDescent().solve(W, spec, FIT, Quadratic(H * 0)), Nearest().solve(W, spec, FIT, None))
    H[::5], H[:, ::5] = 0, 0
    q = CyclicDescent().solve(W, spec, FIT, Quadratic(H)).dequantize()
    assert not q[:, ::5].any()
    assert q.isfinite().all()
    with pytest.raises(ConfigError, match="sweeps"):
        CyclicDescent(0)


@dataclass(frozen=True, slots=True)
class Both:
    """Solves with QuantEase and writes down what GPTQ would have cost."""

    spent: list[tuple[float, float]]

    def refuses(self, spec: Spec) -> str | None:
        return None

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        assert quadratic is not None
        q, peer = (s.solve(W_NK, spec, fit, quadratic) for s in (CyclicDescent(), Gptq()))
        self.spent.append((output_error(W_NK, q, quadratic), output_error(W_NK, peer, quadratic)))
        return q


@pytest.mark.slow
def test_layer_errors_of_a_trained_model(judge, claims) -> None:  # type: ignore[no-untyped-def]
    spent: list[tuple[float, float]] = []
    recipe = replace(quantease(3, -1), solver=Both(spent))
    recipe.quantize(judge.model(), Job(data=judge.data(0), progress=False))
    ours, theirs = ([pair[k] / pair[1] for pair in spent] for k in (0, 1))
    claims.order("quantease", "layer errors no higher than gptq's, 3 bits, a row a scale", ours=ours, theirs=theirs)


@pytest.mark.slow
def test_claim(judge, claims) -> None:  # type: ignore[no-untyped-def]
    setting = {"bits": 3, "group_size": -1}
    ours, theirs = ([judge.kl(m, seed=seed, **setting) for seed in range(3)] for m in ("quantease", "gptq"))
    claims.order("quantease", "KL no higher than gptq's, 3 bits, a row a scale", ours=ours, theirs=theirs)
