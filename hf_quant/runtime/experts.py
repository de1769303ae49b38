"""Experts: transformers' fused 3-D expert weights as one ordinary linear layer a matrix (see `runtime.stand_in`).

`experts.<e>.gate_up` and `experts.<e>.down` are `nn.Linear` while a model is calibrated, and `QuantLinear` after. The
names match none of transformers' conversion patterns, which fuse and split `experts.*.<x>_proj.weight` at load and
save.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_quant.errors import UnsupportedModel
from hf_quant.runtime.grouped import Group, grouped
from hf_quant.runtime.layouts import expect
from hf_quant.runtime.stand_in import Part, StandIn


class Expert(nn.Module):
    """The two matrices of one expert; `gate_up` is the first one, with or without a gate."""

    def __init__(self, gate_up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down


class Experts(StandIn):
    """Stands in for a fused experts module, with its forward: children `0 .. E-1` are `Expert`s.

    Whatever else the fused module holds (activation, limits, norms, config) is taken over under the same names, so
    its own gate function runs unchanged.
    """

    stock_weight: ClassVar[str] = "down_proj"
    source: type[nn.Module]
    num_experts: int
    _groups: dict[str, Group | None]  # of quantized experts, by member

    def __init__(self, fused: nn.Module) -> None:
        """Unfuse: the experts' weights are views of the fused tensors (transposed where they are stored so)."""
        super().__init__()
        reason = refuses(fused)
        if reason is not None:
            raise UnsupportedModel(reason)
        own = set(vars(nn.Module()))
        self.__dict__.update({k: v for k, v in vars(fused).items() if k not in own})
        self.source, self.training = type(fused), fused.training
        for name, child in fused.named_children():
            self.add_module(name, child)
        first, second = _names(fused)
        self.num_experts = getattr(fused, second).shape[0]
        for e in range(self.num_experts):
            self.add_module(str(e), Expert(_linear(fused, first, e), _linear(fused, second, e)))
        self._groups = {}
        expect(self)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """See `refuses`."""
        return is_fused(module) and refuses(module) is None

    @classmethod
    def of(cls, module: nn.Module) -> "Experts":
        """See `__init__`."""
        return cls(module)

    def expert(self, e: int) -> Expert:
        """The e-th expert."""
        child = self._modules[str(e)]
        assert isinstance(child, Expert)  # noqa: S101  `__init__` has put it there
        return child

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every token through its experts, weighed: `[T, H]`, `[T, k]`, `[T, k]` -> `[T, H]`.

        Quantized experts of one kind are two products (`runtime.grouped`). Others run one after the other; while
        compiling, all of them on every token (static shapes, no break in the graph): the result is the same, the work
        is E / k times as much.
        """
        x = hidden_states
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.compiler.is_compiling():  # then it was called right before
            self.lay_out()
        first, second = self._groups.get("gate_up"), self._groups.get("down")
        if first is not None and second is not None and first.ready == second.ready == (x.device, x.dtype):
            y = self._grouped(first, second, x, top_k_index, top_k_weights)
            return y.to(hidden_states.dtype)
        if torch.compiler.is_compiling():
            return self._dense(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            if 0 <= e < self.num_experts:  # expert parallelism marks tokens of other ranks by num_experts
                token, position = torch.where(top_k_index == e)
                weighed = self._run(e, hidden_states[token]) * top_k_weights[token, position, None]
                result.index_add_(0, token, weighed.to(result.dtype))
        return result

    def _dense(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            weight = (top_k_weights * (top_k_index == e)).sum(-1, keepdim=True)
            result = result + (self._run(e, hidden_states) * weight).to(result.dtype)
        return result

    def _grouped(self, first: Group, second: Group, x_TH: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        gate_up, down = self._layers("gate_up"), self._layers("down")
        y = self._activated(first.product(x_TH, chosen_Tk, gate_up)).to(x_TH.dtype)
        y = self._normed(second.product(y, chosen_Tk.reshape(-1, 1), down))
        outside = (chosen_Tk < 0) | (chosen_Tk >= self.num_experts)  # tokens of other ranks
        return (y.view(*chosen_Tk.shape, -1) * weights_Tk.masked_fill(outside, 0)[..., None]).sum(1)

    def _run(self, e: int, x_TK: Tensor) -> Tensor:
        expert = self.expert(e)
        return self._normed(expert.down(self._activated(expert.gate_up(x_TK))))

    def _activated(self, y: Tensor) -> Tensor:
        theirs: Any = self  # gate, activation and norm are what the fused class defines
        result: Tensor = theirs.source._apply_gate(self, y) if theirs.has_gate else theirs.act_fn(y)
        return result

    def _normed(self, y: Tensor) -> Tensor:
        theirs: Any = self
        result: Tensor = theirs.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        return result

    def lay_out(self) -> None:
        """See `layouts.Waiting`."""
        for member in ("gate_up", "down"):
            group, layers = self._groups.get(member), self._layers(member)
            if group is None or not group.holds(layers):
                self._groups[member] = grouped(layers)

    def _layers(self, member: str) -> list[nn.Module]:
        return [getattr(self.expert(e), member) for e in range(self.num_experts)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        self._groups = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the groups, which belong to this process."""
        return {**self.__dict__, "_groups": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wait for compilations again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        expect(self)

    def members(self, name: str, value: Tensor) -> Iterator[tuple[str, Part, Tensor]]:
        """See `StandIn.members`."""
        member = "down" if name.startswith("down_proj") else "gate_up"
        for e in range(self.num_experts):
            if name.endswith("_bias"):
                yield f"{e}.{member}", "bias", value[e]
            else:
                yield f"{e}.{member}", "weight", value[e].T if self.is_transposed else value[e]

    def put_back(self) -> nn.Module:
        """See `StandIn.put_back`."""
        fused = self.source.__new__(self.source)
        nn.Module.__init__(fused)
        own = set(vars(nn.Module())) | {"source", "_groups"}
        fused.__dict__.update({k: v for k, v in vars(self).items() if k not in own})
        fused.training = self.training
        for name, child in self.named_children():
            if not isinstance(child, Expert):
                fused.add_module(name, child)
        for member, name in zip(("gate_up", "down"), _names(self), strict=True):
            layers = [getattr(self.expert(e), member) for e in range(self.num_experts)]
            weights = [layer.weight.detach().clone() for layer in layers]
            stacked = torch.stack([w.T if self.is_transposed else w for w in weights])
            setattr(fused, name, nn.Parameter(stacked, requires_grad=False))
            if self.has_bias:
                biases = torch.stack([layer.bias.detach() for layer in layers])
                setattr(fused, name + "_bias", nn.Parameter(biases, requires_grad=False))
        return fused

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.num_experts} experts of {self.source.__name__}"


def is_fused(module: nn.Module) -> bool:
    """True for a module that holds the weights of several experts in 3-D parameters."""
    return any(p.dim() == 3 and name in ("gate_up_proj", "up_proj", "down_proj") for name, p in _own(module).items())


def refuses(module: nn.Module) -> str | None:
    """None when `Experts` can stand in for the fused module, else the reason why not."""
    name = type(module).__name__
    if not is_fused(module):
        return f"{name} holds no fused expert weights"
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")):
        return f"{name} does not follow transformers' experts interface; its forward is not known"
    wanted = set(_names(module))
    wanted |= {n + "_bias" for n in wanted} if module.has_bias else set()
    if set(_own(module)) != wanted:
        return f"{name} holds {sorted(_own(module))} where {sorted(wanted)} are expected"
    return None


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _linear(fused: nn.Module, name: str, e: int) -> nn.Linear:
    """The e-th matrix of a fused parameter as a linear layer that shares its storage."""
    weight = getattr(fused, name).detach()[e]
    weight = weight.T if fused.is_transposed else weight
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        layer.bias = nn.Parameter(getattr(fused, name + "_bias").detach()[e], requires_grad=False)
    return layer
