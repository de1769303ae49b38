"""LaidOut: a canonical tensor kept in a kernel's layout only. Looks like itself, is restored when an op reads it."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from hf_quant.formats import Layer, PackedFormat
from hf_quant.runtime.weight_view import written

READ_MEMORY = (Tensor.numpy, Tensor.tolist)
POINT_TO_MEMORY = (Tensor.untyped_storage, Tensor.storage, Tensor.data_ptr)


class Owner(Protocol):
    """The module that the tensor is a Parameter of."""

    format: PackedFormat
    kernel: str

    def prepare(self) -> None:
        """Keeps canonical tensors again, until the next forward."""


class LaidOut(torch.Tensor):
    """One canonical tensor of a module, held by the blob of its kernel.

    Shape, dtype and device are free. Any operator sees the canonical tensor, restored to the bit and dropped again. An
    operator that writes has the module take its canonical tensors back, and writes to them.
    """

    source: tuple[PackedFormat, str, list[Tensor], Layer]
    key: str
    owner: "weakref.ref[Any]"

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:  # noqa: ANN401
        """As `nn.Parameter(data)`, for code that makes a Parameter of the type of another one."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def of(cls, owner: Owner, name: str, blob: list[Tensor], layer: Layer) -> "LaidOut":
        """The tensor `name` of a module that has made its layout."""
        like: Tensor = getattr(owner, name)
        return cls._made(like, (owner.format, owner.kernel, blob, layer), name, weakref.ref(owner))

    @classmethod
    def _made(cls, like: Tensor, source: Any, name: str, owner: "weakref.ref[Any]") -> "LaidOut":  # noqa: ANN401
        view: LaidOut = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        view.source, view.key, view.owner = source, name, owner
        return view

    def restored(self) -> Tensor:
        """The canonical tensor."""
        fmt, kernel, blob, layer = self.source
        return fmt.restore(blob, layer, kernel)[self.key]

    def _to_write(self) -> Tensor:
        owner = self.owner()
        if owner is None or owner._parameters.get(self.key) is None:
            raise RuntimeError(f"{self.key} is a packed tensor of a module that is gone; write to a clone of it")
        owner.prepare()
        parameter: Tensor = owner._parameters[self.key]
        return parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Any,  # noqa: ANN401  torch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Methods that read memory behind the dispatcher's back get the canonical tensor; where they answer with its
        place, the module's own, which stays there until the next forward.
        """
        if func in READ_MEMORY or func in POINT_TO_MEMORY:
            args = tree_map_only(cls, cls.restored if func in READ_MEMORY else cls._to_write, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch documents it as a class method
        cls,
        func: Any,  # noqa: ANN401  torch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run `func` on canonical tensors."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            view = args[0]
            return cls._made(view, view.source, view.key, view.owner)
        kwargs = dict(kwargs or {})
        targets = {id(t): t._to_write() for t in written(func, args, kwargs) if isinstance(t, cls)}
        args, kwargs = tree_map_only(
            cls, lambda t: targets[id(t)] if id(t) in targets else t.restored(), (args, kwargs)
        )
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A Parameter of its own, canonical."""
        return nn.Parameter(self.restored(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401
        """Pickled as the canonical tensor."""
        return self.restored().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # noqa: ANN401
        return f"LaidOut({self.key}, {tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


_holders: Any = WeakIdKeyDictionary()  # Parameter -> the modules it is registered in


def hold(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Note that the module has these Parameters."""
    for parameter in parameters:
        _holders.setdefault(parameter, weakref.WeakSet()).add(module)


def is_shared(parameter: Tensor) -> bool:
    """Whether more than one module has it: a table and a head that are tied."""
    return len(_holders.get(parameter, ())) > 1
