"""The Fisher form on a net of 204 parameters, against its dense Fisher matrix and against the KL."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_quant.plugins.allocation.fisher import Fisher
from hf_quant.plugins.allocation.one_site import OneSiteKl
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.allocator import Slot

SITES = ("first", "second")
SLOTS = [Slot(SITES, (int_spec(4),))]


class Net(nn.Module):
    """204 parameters, 192 of them in its two matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(self.first(x).tanh()) * 2)


def dense_fisher(net: nn.Module, sites: tuple[str, ...], x_TK: Tensor) -> Tensor:
    """`mean J^T (diag p - p p^T) J`, a token at a time."""
    weights = {f"{n}.weight": net.get_submodule(n).weight.detach() for n in sites}
    total: Tensor | float = 0.0
    for token in x_TK:
        jacobian = torch.func.jacrev(lambda w, t=token: torch.func.functional_call(net, w, (t,)).logits)(weights)
        J = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
        p = net(token).logits.detach().softmax(-1)
        total = total + J.T @ (p.diag() - p.outer(p)) @ J
    return torch.as_tensor(total).detach() / len(x_TK)


def test_it_is_half_the_form_of_the_dense_matrix_and_what_kl_is_for_small_errors() -> None:
    net, x = Net(), torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(5)
    errors = {n: 0.01 * torch.randn(net.get_submodule(n).weight.shape, generator=noise) for n in SITES}

    def rounded(name: str, _: Spec) -> Tensor:
        return net.get_submodule(name).weight.detach() + errors[name]

    E = torch.cat([e.flatten() for e in errors.values()])
    exact = float(E @ dense_fisher(net, SITES, x.flatten(0, 1)) @ E) / 2
    ((drawn,),) = Fisher(rows=3200).losses(net, SLOTS, rounded, [{"x": x.repeat(400, 1, 1)}], seed=0)
    ((measured,),) = OneSiteKl(rows=8).losses(net, SLOTS, rounded, [{"x": x}], seed=0)
    assert drawn == pytest.approx(exact, rel=0.1)
    assert measured == pytest.approx(exact, rel=0.1)


def test_no_error_costs_nothing_and_the_model_is_left_alone() -> None:
    net, x = Net(), torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(1))
    net.first.weight.requires_grad_(False)
    before = {n: (p, p.clone(), p.requires_grad) for n, p in net.named_parameters()}
    slots = [Slot((n,), (int_spec(2), int_spec(4), int_spec(8))) for n in SITES]

    def rounded(name: str, spec: Spec) -> Tensor:
        return net.get_submodule(name).weight.detach() * {2: 1.1, 4: 1.02, 8: 1.0}[int(spec.grid.bits)]

    found = Fisher().losses(net, slots, rounded, [{"x": x}], 0)
    assert found == Fisher().losses(net, slots, rounded, [{"x": x}], 0)
    assert all(low > middle > none == 0 for low, middle, none in found)
    for n, p in net.named_parameters():
        assert p is before[n][0]
        assert torch.equal(p, before[n][1])
        assert p.requires_grad == before[n][2]
        assert p.grad is None
