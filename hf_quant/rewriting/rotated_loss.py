"""The loss of a rotated and rounded model as a function of its rotations, for transforms that learn them.

A copy of the model is prepared once (untied, gains folded); each call makes its weights anew from the rotations,
rounds them and every layer's input to nearest, and lets gradients straight through the rounding.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_quant.operators import need_operator
from hf_quant.plan import SitePlan
from hf_quant.qtensor import nearest
from hf_quant.rewriting.anatomy import Body
from hf_quant.rewriting.rewrite import fold_norm, weight_of
from hf_quant.rewriting.rotate import heads_of, untie
from hf_quant.runtime.activation import fake_quantize
from hf_quant.sites import SiteGroup
from hf_quant.stages.objective import ModelLoss
from hf_quant.stages.range import AbsMaxRange
from hf_quant.stages.sampler import Batch
from hf_quant.stages.transform import Rotations


@dataclass(eq=False)
class RotatedLoss:
    """Callable as `stages.transform.Loss`."""

    model: nn.Module
    body: Body
    plans: Mapping[str, SitePlan]
    batches: Sequence[Batch]
    copied: nn.Module = field(init=False)
    online: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        need_operator("hadamard")
        self.plans = {name: plan for name, plan in self.plans.items() if plan.site.kind != "embedding"}
        self.copied = copy.deepcopy(self.model).float().requires_grad_(False).eval()
        untie(self.copied)
        for name, readers in self.body.norms.items():
            fold_norm(name, self.copied.get_submodule(name), [self.copied.get_submodule(r) for r in readers])
        for name in self.plans:
            self.copied.get_submodule(name).register_forward_pre_hook(self._round_input(name))

    def _round_input(self, name: str) -> Any:  # noqa: ANN401  a hook
        spec = self.plans[name].recipe.inputs

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if name in self.online:
                x = torch.ops.hf_quant.hadamard(x, self.online[name].size, self.online[name].seed, False)
            if spec is not None and not spec.stored:  # what calibration would fit is not known yet
                flat = x.reshape(-1, x.shape[-1])
                x = x + (fake_quantize(flat, spec, {}).view_as(x) - x).detach()
            return x, *args[1:]

        return hook

    def __call__(self, rotations: Rotations, step: int) -> Tensor:
        """Of the batch whose turn it is."""
        groups = {g.sites[0].name: g for g in self.body.inner}
        self.online = {s.name: r for n, r in rotations.online.items() for s in groups[n].sites}
        W = {n: weight_of(self.copied.get_submodule(n)) for n in self._changed(rotations, groups)}
        b: dict[str, Tensor] = {}
        if rotations.residual is not None:
            self._rotate_stream(W, b, rotations.residual.float())
        for name, R in rotations.heads.items():
            self._rotate_heads(W, b, groups[name], R.float())
        for name, rotation in self.online.items():
            W[name] = torch.ops.hf_quant.hadamard(W[name], rotation.size, rotation.seed, False)
        for name, plan in self.plans.items():
            W[name] = W[name] + (_nearest(W[name].detach(), plan) - W[name]).detach()
        tensors = {f"{n}.weight": self._stored(n, w) for n, w in W.items()} | {f"{n}.bias": v for n, v in b.items()}
        return ModelLoss().loss(_Called(self.copied, tensors), self.batches[step % len(self.batches)])

    def _changed(self, rotations: Rotations, groups: Mapping[str, SiteGroup]) -> list[str]:
        names = [*self.plans, *(str(groups[n].producer) for n in rotations.heads)]
        if rotations.residual is not None:
            names += [*self.body.tables, *self.body.writers, *(r for rs in self.body.norms.values() for r in rs)]
        return list(dict.fromkeys(names))

    def _stored(self, name: str, W: Tensor) -> Tensor:
        return W.T if type(self.copied.get_submodule(name)).__name__ == "Conv1D" else W

    def _bias(self, b: Mapping[str, Tensor], name: str) -> Tensor | None:
        found = b.get(name, getattr(self.copied.get_submodule(name), "bias", None))
        return found if isinstance(found, Tensor) else None

    def _rotate_stream(self, W: dict[str, Tensor], b: dict[str, Tensor], R: Tensor) -> None:
        def centre(t: Tensor) -> Tensor:
            return t - t.mean(-1, keepdim=True) if self.body.centered else t

        for name in self.body.tables:
            W[name] = centre(W[name]) @ R
        for name in self.body.writers:
            W[name] = R.T @ centre(W[name].T).T
            if (bias := self._bias(b, name)) is not None:
                b[name] = centre(bias) @ R
        for norm, readers in self.body.norms.items():
            if (bias := self._bias(b, norm)) is not None:
                b[norm] = bias @ R
            for reader in readers:
                W[reader] = W[reader] @ R

    def _rotate_heads(self, W: dict[str, Tensor], b: dict[str, Tensor], group: SiteGroup, R: Tensor) -> None:
        d, name = group.head, str(group.producer)
        of_producer, of_reader = heads_of(group, R)
        W[name] = (of_producer.mT @ W[name].unflatten(0, (-1, d))).flatten(0, 1)
        if (bias := self._bias(b, name)) is not None:
            b[name] = (of_producer.mT @ bias.view(-1, d, 1)).flatten()
        for site in group.sites:
            W[site.name] = torch.einsum("nhd,hde->nhe", W[site.name].unflatten(-1, (-1, d)), of_reader).flatten(1)


class _Called(nn.Module):
    """The model with other tensors in the place of its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = [model], tensors  # in a list: no submodule

    def forward(self, **inputs: Any) -> Any:  # noqa: ANN401
        return functional_call(self.model[0], self.tensors, kwargs=inputs)


def _nearest(W_NK: Tensor, plan: SitePlan) -> Tensor:
    spec = plan.recipe.weights
    return nearest(W_NK, *AbsMaxRange().fit(W_NK, spec), spec).dequantize()
