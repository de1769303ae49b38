"""The bytes of int-float-zero/1, written out by hand."""

import torch

from hf_quant.formats import Layer, format_for
from hf_quant.grids import IntGrid
from hf_quant.qtensor import QTensor
from hf_quant.spec import Spec

SPEC = Spec(grid=IntGrid(4), block=(1, 4), zero="float")


def test_golden_words() -> None:
    """Eight 4-bit codes a word, the first in the lowest bits; zero points as they are."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    zero = torch.tensor([[7.3, -0.1]])
    q = QTensor(codes, torch.tensor([[0.5, 2.0]]), zero, SPEC, (1, 8))
    layer = Layer((1, 8), SPEC)
    packed = format_for(layer).pack(q)
    assert packed["qweight"].tolist() == [[0x87654321 - (1 << 32)]]
    assert packed["scale"].dtype == torch.bfloat16
    assert torch.equal(packed["zero_point"], zero)
    want = torch.tensor([[(1 - 7.3) * 0.5, (2 - 7.3) * 0.5, (3 - 7.3) * 0.5, (4 - 7.3) * 0.5, 10.2, 12.2, 14.2, 16.2]])
    assert torch.allclose(format_for(layer).weight(packed, layer, torch.float32), want)
