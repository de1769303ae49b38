"""Products with a submodule's weight on the left are seen, and no others."""

import torch
from torch import Tensor, nn

from hf_quant.left_products import left_products


class Viewed(nn.Module):
    """Its weight is made whenever it is asked for."""

    @property
    def weight(self) -> Tensor:
        """Another object every time."""
        return nn.Parameter(torch.ones(2, 3))


def test_a_weight_on_the_left_is_seen() -> None:
    module, seen = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}), list[tuple[str, Tensor]]()
    x_KT = torch.randn(3, 5)
    with left_products(module, ["a"], lambda path, x: seen.append((path, x))):
        assert (module["a"].weight @ x_KT).shape == (2, 5)
        torch.matmul(module["b"].weight, x_KT)
    assert [path for path, _ in seen] == ["a"]
    assert torch.equal(seen[0][1], x_KT.T)


def test_what_a_property_makes_is_nobodys_weight() -> None:
    """Its id is free at once: what comes next may have it."""
    assert not left_products(nn.ModuleDict({"a": Viewed()}), ["a"], lambda *_: None).weights
