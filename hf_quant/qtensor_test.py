import pytest
import torch

from hf_quant.qtensor import QTensor, row_slices
from hf_quant.runtime.packed import refit
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.solver import Nearest

SPECS = {
    "groups": int_spec(4, 64),
    "symmetric": int_spec(4, 64, symmetric=True),
    "rows": int_spec(8, -1),
    "tensor": Spec(grid=int_spec(8).grid, block=(-1, -1), zero="int"),
    "tiles": Spec(grid=int_spec(4).grid, block=(128, 64), zero="int"),
}


def same(a: QTensor, b: QTensor) -> bool:
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero))
    return all(x is y or torch.equal(x, y) for x, y in pairs) and (a.spec, a.shape) == (b.spec, b.shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (1000, 1000), (2, 1 << 19)])
def test_row_slices_cover_every_row_once(shape):
    rows = [r for s in row_slices(shape) for r in range(shape[0])[s]]
    assert rows == list(range(shape[0]))
    assert all(len(range(shape[0])[s]) * shape[1] <= max(1 << 18, shape[1]) for s in row_slices(shape))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_slices_are_the_matrix(name):
    q = refit(torch.randn(900, 1000, generator=torch.Generator().manual_seed(0)), SPECS[name])
    parts = list(q.slices())
    assert len(parts) == (1 if name == "tiles" else 4)
    assert torch.equal(torch.cat([part.dequantize() for _, part in parts]), q.dequantize())
    assert all(part.shape[0] == len(range(900)[rows]) for rows, part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_nearest_in_slices_is_nearest_at_once(name, dtype):
    W = torch.randn(900, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(Nearest().solve(W, SPECS[name], AbsMaxRange(), None), refit(W, SPECS[name]))
