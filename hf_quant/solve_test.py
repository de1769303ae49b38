"""What a solver gives is looked at before it is believed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_quant.errors import ConfigError, PluginError
from hf_quant.formats import Layer, format_for
from hf_quant.grids import CodebookGrid
from hf_quant.plan import SitePlan
from hf_quant.qtensor import QTensor
from hf_quant.recipe import Recipe
from hf_quant.runtime.branches import Constant, LowRank, Sparse, stored_in
from hf_quant.sites import Site
from hf_quant.solve import Solved, moved, solve
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.objective import Quadratic
from hf_quant.stages.range import Range
from hf_quant.stages.solver import Nearest

SHAPE = (8, 40)
W_NK = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
Changed = Callable[[QTensor, Tensor], object]


@dataclass(frozen=True)
class Theirs:
    change: Changed

    def refuses(self, spec: Spec) -> str | None:
        return None

    def solve(self, W_NK: Tensor, spec: Spec, fit: Range, quadratic: Quadratic | None) -> QTensor:
        return self.change(Nearest().solve(W_NK, spec, fit, quadratic), W_NK)  # type: ignore[return-value]


def solved(change: Changed, spec: Spec) -> Solved:
    layer = Layer(SHAPE, spec)
    recipe = Recipe(weights=spec, solver=Theirs(change))
    return solve(SitePlan(Site("a.proj", "linear", SHAPE, "a"), recipe, layer, format_for(layer)), W_NK.clone(), None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, W: W, "it is Tensor, no QTensor"),
        (lambda q, W: (W.zero_(), q)[1], "wrote into the weight"),
        (lambda q, W: replace(q, shape=(40, 8)), "shape is"),
        (lambda q, W: replace(q, spec=int_spec(3, 16)), "spec is"),
        (lambda q, W: replace(q, codes=q.codes[:, :-1]), r"codes is \[8, 39\], not \[8, 40\]"),
        (lambda q, W: replace(q, codes=q.codes + 3), "integers from 0 to 15"),
        (lambda q, W: replace(q, codes=q.codes.to(torch.int8) - 8), "integers from 0 to 15"),
        (lambda q, W: replace(q, codes=q.codes.float()), "integers from 0 to 15"),
        (lambda q, W: replace(q, scale=q.scale[:, :1]), r"scale is \[8, 1\], not \[8, 3\]"),
        (lambda q, W: replace(q, scale=q.scale * float("nan")), "scale holds NaN"),
        (lambda q, W: replace(q, scale=q.scale * 1.001), "scale does not lie on the grid"),
        (lambda q, W: replace(q, zero=None), "zero is missing"),
        (lambda q, W: replace(q, zero=q.zero + 0.4), "zero point does not lie on the grid"),
        (lambda q, W: replace(q, zero=q.zero + 30), "zero point does not lie on the grid"),
    ],
)
def test_a_solver_that_breaks_its_contract_is_named(change: Changed, told: str) -> None:
    with pytest.raises(PluginError, match=rf"Theirs, of a\.proj: .*{told}"):
        solved(change, int_spec(4, 16))


def test_a_zero_point_that_the_spec_does_not_have() -> None:
    with pytest.raises(PluginError, match="zero is there"):
        solved(lambda q, W: replace(q, zero=q.scale), int_spec(4, 16, symmetric=True))


def test_one_that_keeps_it() -> None:
    assert solved(lambda q, W: replace(q, codes=q.codes.long()), int_spec(4, 16)).entry.error < 0.1


def test_a_grid_that_no_saved_model_could_name() -> None:
    @dataclass(frozen=True)
    class Thirds:
        bits: int = 2
        vector: int = 1

        def encode(self, x: Tensor) -> Tensor:
            return x.mul(3).round().clamp(0, 3).to(torch.uint8)

        def decode(self, codes: Tensor) -> Tensor:
            return codes / 3

    with pytest.raises(ConfigError, match="Thirds is no grid"):
        Layer(SHAPE, Spec(grid=Thirds()))


def test_all_of_what_was_solved_moves() -> None:
    spec = Spec(grid=CodebookGrid(2), block=(1, 20), zero="none")
    q = QTensor(
        torch.zeros(8, 40).byte(), torch.ones(8, 2), None, spec, SHAPE, {"a": W_NK}, torch.zeros(8, 2, 4), W_NK[0]
    )
    low = LowRank(W_NK[:2], W_NK[:, :2])
    branches = low, stored_in(low, 8), Sparse.of(W_NK, W_NK > 1), Constant(W_NK[:, 0])
    done = Solved(q, branches, int_spec(8, 16), (W_NK, None), solved(lambda q, W: q, int_spec(4, 16)).entry)
    gone = moved(done, torch.device("meta"))
    inner = gone.q
    assert inner.nested is not None
    parts = [inner.codes, inner.scale, inner.codebook, inner.tensor_scale, inner.nested["a"], gone.input_range[0]]
    assert {t.device.type for t in (*parts, *(t for b in gone.branches for t in b.tensors))} == {"meta"}
    assert [type(branch) for branch in gone.branches] == [type(branch) for branch in branches]
    assert (inner.spec, inner.zero, gone.inputs, gone.entry) == (spec, None, done.inputs, done.entry)
