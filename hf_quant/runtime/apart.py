"""Apart: fused experts and convolutions replaced by stand-ins whose matrices are linear layers, and put back."""

from collections.abc import Callable

from torch import nn

from hf_quant.runtime.conv import UnfoldedConv
from hf_quant.runtime.experts import Experts
from hf_quant.runtime.packed import Packed
from hf_quant.runtime.stand_in import StandIn

KINDS: tuple[type[StandIn], ...] = (Experts, UnfoldedConv)


def can_take_apart(module: nn.Module) -> bool:
    """Whether some stand-in takes the module."""
    return any(kind.takes(module) for kind in KINDS)


def stand_in_for(module: nn.Module) -> StandIn:
    """A stand-in for a module that `can_take_apart`."""
    return next(kind for kind in KINDS if kind.takes(module)).of(module)


def take_apart(model: nn.Module) -> list[str]:
    """Replace every module that some stand-in takes, in place; the names of those replaced."""
    found = [name for name, module in model.named_modules() if name and can_take_apart(module)]
    for name in found:
        model.set_submodule(name, stand_in_for(model.get_submodule(name)))
    return found


def put_back_all(model: nn.Module) -> list[str]:
    """Put every module back; the names of those replaced."""
    return _put_back(model, lambda module: True)


def put_back_floats(model: nn.Module) -> list[str]:
    """Put back the modules none of whose matrices is quantized, as stock code saves and loads them."""
    return _put_back(model, lambda module: not any(isinstance(m, Packed) for m in module.modules()))


def _put_back(model: nn.Module, which: Callable[[StandIn], bool]) -> list[str]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, StandIn) and which(m)}
    for name, module in found.items():
        model.set_submodule(name, module.put_back())
    return list(found)
