"""Clock: how the denoising step reaches the layers whose input ranges depend on it.

    entry_b = argmin_e |t_b - steps_e|,    input b of a layer is rounded with scale[entry_b]

The root network's own argument `timestep` (one for all samples, or one each) is read once a forward; tables are keyed
by its value, so other schedulers and numbers of steps find their nearest entry.
"""

import inspect
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import CheckpointError, ConfigError, UnsupportedModel

NAME = "timestep"


class Clock:
    """A forward pre-hook of the root network, shared by its layers. Copies of a model get a clock of their own.

    Attributes:
        steps: the timesteps of the entries of a table, ascending.
        entry_B: the entries that hold now, `[B]` or `[1]`; None before the first forward.
    """

    def __init__(self, steps: Sequence[float]) -> None:
        given = list(steps) if isinstance(steps, Sequence) else []
        if (
            not given
            or not all(isinstance(s, int | float) and isfinite(s) for s in given)
            or given != sorted(set(given))
        ):
            raise ConfigError(f"steps={steps!r}: timesteps of a table, ascending")
        self.steps = tuple(float(s) for s in given)
        self.position = 0
        self.entry_B: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the timestep of a forward that begins."""
        t = kwargs[NAME] if NAME in kwargs else args[self.position] if self.position < len(args) else None
        if t is None:
            raise ConfigError(f"{type(module).__name__} has input ranges by timestep: pass it `timestep`")
        self.entry_B = self.nearest(t)

    def nearest(self, t: Tensor | float) -> Tensor:
        """int64 `[B]`: the entry nearest to each timestep."""
        t_B = torch.as_tensor(t).reshape(-1).float()
        return (t_B[:, None] - torch.tensor(self.steps, device=t_B.device)).abs().argmin(1)

    def by_token(self, tokens: int, device: torch.device) -> Tensor:
        """int64 `[T]`: the entry of every token of a layer's input, whose samples lie one after the other."""
        if self.entry_B is None:
            raise ConfigError("a layer with input ranges by timestep ran outside its network, so it knows no timestep")
        samples = self.entry_B.shape[0]
        if tokens % samples:
            raise ConfigError(f"{samples} timesteps do not go with {tokens} tokens: one for all samples, or one each")
        return self.entry_B.to(device).repeat_interleave(tokens // samples)

    def watch(self, root: nn.Module) -> None:
        """Read the timestep whenever this network runs, in place of any other clock.

        Raises:
            UnsupportedModel: its forward takes none.
        """
        self.position = position_in(root)
        unwatch(root)
        root.register_forward_pre_hook(self, with_kwargs=True)


def position_in(root: nn.Module) -> int:
    """Where the timestep stands among the positional arguments of a network.

    Raises:
        UnsupportedModel: its forward takes none.
    """
    names = list(inspect.signature(type(root).forward).parameters)[1:]  # an offloading hook hides the instance's
    if NAME not in names:
        raise UnsupportedModel(f"{type(root).__name__}.forward takes no `{NAME}`, which input ranges are to follow")
    return names.index(NAME)


def unwatch(root: nn.Module) -> None:
    """Take the clock off a network."""
    for key, hook in list(root._forward_pre_hooks.items()):
        if isinstance(hook, Clock):
            del root._forward_pre_hooks[key]
            root._forward_pre_hooks_with_kwargs.pop(key, None)


def bind(root: nn.Module) -> None:
    """One clock for all layers of a loaded network that need one; nothing happens when none does.

    Raises:
        CheckpointError: tables of different steps in one network.
        UnsupportedModel: the network takes no timestep.
    """
    timed = [m for m in root.modules() if isinstance(getattr(m, "clock", None), Clock)]
    if not timed:
        return
    clock = Clock(timed[0].clock.steps)  # type: ignore[union-attr, arg-type]
    for module in timed:
        if module.clock.steps != clock.steps:  # type: ignore[union-attr]
            raise CheckpointError("the layers' tables of input ranges have different timesteps; the config is damaged")
        module.clock = clock  # type: ignore[assignment]
    clock.watch(root)
