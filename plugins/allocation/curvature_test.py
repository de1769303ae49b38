"""Curvature and linearity on a net of 204 parameters, against its dense Hessian and Fisher matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hf_quant.plugins.allocation.curvature import HutchinsonTrace, SelfDistillation, TopEigenvalue, hessian_product
from hf_quant.plugins.allocation.fisher import Fisher
from hf_quant.plugins.allocation.fisher_test import Net, dense_fisher
from hf_quant.plugins.allocation.linearity import Linearity
from hf_quant.plugins.allocation.one_site import OneSiteKl, OneSiteMse
from hf_quant.spec import Spec, int_spec
from hf_quant.stages.allocator import Slot
from hf_quant.stages.sampler import Batch

SPEC = int_spec(4, 8)
BOTH = [Slot(("first", "second"), (SPEC,))]
EACH = [Slot(("first",), (SPEC,)), Slot(("second",), (SPEC,))]


@dataclass(frozen=True)
class CrossEntropy:
    """A loss with labels, whose Hessian has negative directions as well."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x = batch["x"]
        return nn.functional.cross_entropy(model(x).logits.flatten(0, -2), x.flatten(0, -2).argmax(-1))


def batches(rows: int = 8) -> list[Batch]:
    return [{"x": torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(1))}]


def shifted(net: nn.Module, by: Callable[[Tensor], Tensor] = torch.ones_like) -> Callable[[str, Spec], Tensor]:
    """Stands for rounding with a known error."""
    return lambda name, _: net.get_submodule(name).weight.detach() + by(net.get_submodule(name).weight.detach())


def dense(net: Net, names: tuple[str, ...], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian with respect to the weights of these layers."""
    weights = {f"{n}.weight": net.get_submodule(n).weight.detach() for n in names}
    shapes = [w.shape for w in weights.values()]

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(weights, parts, shapes, strict=True)}
        call = lambda x: torch.func.functional_call(net, values, (x,))  # noqa: E731
        return loss(call)  # type: ignore[arg-type]

    flat = torch.cat([w.flatten() for w in weights.values()])
    hessian: Tensor = torch.autograd.functional.hessian(of, flat)
    return hessian


def cross_entropy(model: nn.Module) -> Tensor:
    return CrossEntropy().loss(model, batches()[0])


def test_the_top_eigenvalue_is_the_dense_hessians(claims) -> None:  # type: ignore[no-untyped-def]
    net = Net()
    for slots in (BOTH, EACH):
        found = TopEigenvalue(CrossEntropy(), rows=8, most=200, tolerance=1e-3).losses(
            net, slots, shifted(net), batches(), seed=0
        )
        for slot, (value,) in zip(slots, found, strict=True):
            exact = float(torch.linalg.eigvalsh(dense(net, slot.sites, cross_entropy))[-1])
            claims.invariant(
                "hawq",
                f"eigenvalue within 5 % of the dense Hessian's on a net of 200 parameters ({'+'.join(slot.sites)})",
                abs(value - exact) < 0.05 * exact,
                {"power_iteration": value, "dense": exact},
            )


def test_the_trace_is_the_dense_hessians(claims) -> None:  # type: ignore[no-untyped-def]
    net = Net()
    estimator = HutchinsonTrace(CrossEntropy(), rows=8, least=2000, most=2000)
    for slot in EACH:
        ((value,),) = estimator.losses(net, [slot], shifted(net), batches(), seed=0)
        exact = float(dense(net, slot.sites, cross_entropy).trace())
        claims.invariant(
            "hawq-v2",
            f"Hutchinson's trace within 10 % of the exact one ({slot.sites[0]})",
            abs(value - exact) < 0.1 * exact,
            {"hutchinson": value, "exact": exact},
        )


def test_probes_stop_when_they_are_sure() -> None:
    net = Net()
    asked: list[int] = []

    @dataclass(frozen=True)
    class Counted:
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch["x"]).logits
            z.register_hook(lambda _: asked.append(1))
            return (z.square()).mean()  # a quadratic of the last layer

    few = HutchinsonTrace(Counted(), tolerance=0.5).losses(net, EACH, shifted(net), batches(), seed=0)
    assert 8 <= len(asked) <= 30
    assert few == HutchinsonTrace(Counted(), tolerance=0.5).losses(net, EACH, shifted(net), batches(), seed=0)


def test_distilling_from_oneself_has_the_fisher_matrix_for_a_hessian() -> None:
    """Its trace, without labels, is the sum of the squared scores' means; never negative."""
    net = Net()
    weights = [net.first.weight, net.second.weight]
    product = hessian_product([lambda: SelfDistillation().loss(net, batches()[0])], weights)
    columns = [
        torch.cat([h.flatten() for h in product([v[:96].view(12, 8), v[96:].view(8, 12)])]) for v in torch.eye(192)
    ]
    exact = dense_fisher(net, BOTH[0].sites, batches()[0]["x"].flatten(0, 1))
    assert torch.allclose(torch.stack(columns).detach(), exact, atol=1e-5 * float(exact.abs().max()))


def test_alpha_is_the_same_whatever_the_noise() -> None:
    """The theorem on a net of its own: a quarter of the noise, a sixteenth of the loss."""
    net = Net()
    small, large = (Linearity(rows=8, noises=(t,) * 200).alphas(net, EACH, batches(), seed=0) for t in (0.02, 0.08))
    assert small == pytest.approx(large, rel=0.1)
    ((loss,), _) = Linearity(rows=8).losses(net, EACH, shifted(net, lambda W: 0.1 * W), batches(), seed=0)
    assert loss == pytest.approx(0.01 * Linearity(rows=8).alphas(net, EACH, batches(), seed=0)[0])


ALL = [OneSiteKl(), OneSiteMse(), Fisher(), HutchinsonTrace(), TopEigenvalue(), Linearity()]


@pytest.mark.parametrize("sensitivity", ALL, ids=lambda s: type(s).__name__)
def test_no_error_costs_nothing_larger_costs_more_and_the_model_is_left_alone(sensitivity) -> None:  # type: ignore[no-untyped-def]
    net = Net()
    net.first.weight.requires_grad_(False)
    before = {n: (p, p.clone(), p.requires_grad) for n, p in net.named_parameters()}
    slots = [Slot(s.sites, (int_spec(2), int_spec(4), int_spec(8))) for s in EACH]
    sizes = {2: 0.1, 4: 0.02, 8: 0.0}

    def rounded(name: str, spec: Spec) -> Tensor:
        return net.get_submodule(name).weight.detach() * (1 + sizes[int(spec.grid.bits)])

    found = sensitivity.losses(net, slots, rounded, batches(), 0)
    assert found == sensitivity.losses(net, slots, rounded, batches(), 0)
    for low, middle, none in found:
        assert low > middle > none
        assert none == pytest.approx(0, abs=1e-9)
    for n, p in net.named_parameters():
        kept, value, flag = before[n]
        assert p is kept
        assert torch.equal(p, value)
        assert p.requires_grad == flag
        assert p.grad is None
