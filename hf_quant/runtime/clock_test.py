"""What a network is asked for and has no entry of: an error, compiled or not."""

import pytest
import torch
from torch import Tensor, nn

from hf_quant.errors import ConfigError
from hf_quant.runtime.clock import Clock


class Net(nn.Module):
    """Reads its rows by class, as a table of features does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(6.0).reshape(3, 2))
        self.clock = Clock([10, 500], [0, 4, 7])
        self.clock.watch(self)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        row_B = self.clock.class_row()
        assert row_B is not None
        return sample + self.rows[row_B]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_class_without_an_entry_is_refused(backend: str | None) -> None:
    """Compiled, labels have no values while a forward is traced: without a check in the graph it was class 0's row."""
    net: nn.Module = Net()
    run = net if backend is None else torch.compile(net, fullgraph=True, backend=backend)
    given = torch.zeros(2, 2), torch.tensor([3, 400])
    assert torch.equal(run(*given, torch.tensor([7, 4])), torch.tensor([[4.0, 5.0], [2.0, 3.0]]))
    assert torch.equal(run(*given, torch.tensor([0, 4])), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    with pytest.raises(
        ConfigError if backend is None else RuntimeError, match=r"features are stored for .*\[0, 4, 7\]"
    ):
        run(*given, torch.tensor([7, 5]))
