"""Clock: how the denoising step reaches the layers whose input ranges depend on it.

    entry_b = argmin_e |t_b - steps_e|,    input b of a layer is rounded with scale[entry_b]

The root network's own argument `timestep` (one for all samples, or one each) is read once a forward, and with it
`class_labels` where it takes them; tables are keyed by their values, so other schedulers and numbers of steps find
their nearest entry, or the two that they lie between.
"""

import inspect
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from hf_quant.errors import CheckpointError, ConfigError, UnsupportedModel

NAME, CLASSES = "timestep", "class_labels"


class Clock:
    """A forward pre-hook of the root network, shared by its layers. Copies of a model get a clock of their own.

    Attributes:
        steps: the timesteps of the entries of a table, ascending.
        classes: those that stored features have rows of, ascending; none where they do not depend on classes.
        entry_B: the entries that hold now, `[B]` or `[1]`; None before the first forward.
        t_B: the timesteps of now.
        class_B: the classes of now; None where the network takes none.
    """

    def __init__(self, steps: Sequence[float], classes: Sequence[int] = ()) -> None:
        given = list(steps) if isinstance(steps, Sequence) else []
        if (
            not given
            or not all(isinstance(s, int | float) and isfinite(s) for s in given)
            or given != sorted(set(given))
        ):
            raise ConfigError(f"steps={steps!r}: timesteps of a table, ascending")
        if list(classes) != sorted({c for c in classes if type(c) is int}):
            raise ConfigError(f"classes={classes!r}: those of a table, ascending")
        self.steps, self.classes = tuple(float(s) for s in given), tuple(classes)
        self.positions: dict[str, int] = {}
        self.entry_B: Tensor | None = None
        self.t_B: Tensor | None = None
        self.class_B: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the timestep of a forward that begins."""
        given = {n: args[at] for n, at in self.positions.items() if at < len(args)} | kwargs
        if given.get(NAME) is None:
            raise ConfigError(f"{type(module).__name__} has tables by timestep: pass it `timestep`")
        self.set_to(given[NAME], given.get(CLASSES) if CLASSES in self.positions else None)

    def set_to(self, t: Tensor | float, classes: Tensor | None = None) -> None:
        """These timesteps and classes hold from now on."""
        self.t_B = torch.as_tensor(t).reshape(-1).float()
        self.class_B = None if classes is None else torch.as_tensor(classes).reshape(-1)
        self.entry_B = self.nearest(self.t_B)
        if self.classes:
            self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        if self.class_B is None:
            raise ConfigError("features are stored by class: pass the network its `class_labels`")
        if torch.compiler.is_compiling():  # values are not known then
            known_B = torch.isin(self.class_B, torch.tensor(self.classes, device=self.class_B.device))
            torch._assert_async(known_B.all(), f"features are stored for the classes {list(self.classes)} alone")
        elif unknown := sorted(set(self.class_B.tolist()) - set(self.classes)):
            raise ConfigError(
                f"no features are stored for class {unknown[0]}, only for {list(self.classes)}: quantize again with "
                "all classes that will be asked for, and with guidance if there will be any, or use tfmq-dm"
            )

    def class_row(self) -> Tensor | None:
        """int64 `[B]`: which of `classes` each sample has; None without classes."""
        if not self.classes or self.class_B is None:
            return None
        return (self.class_B[:, None] == torch.tensor(self.classes, device=self.class_B.device)).int().argmax(1)

    def between(self) -> tuple[Tensor, Tensor, Tensor]:
        """(low, high, share), `[B]` each: a timestep lies that share of the way between those of two entries."""
        if self.t_B is None:
            raise ConfigError("a layer with tables by timestep ran outside its network, so it knows no timestep")
        steps = torch.tensor(self.steps, device=self.t_B.device)
        high_B = torch.searchsorted(steps, self.t_B.contiguous()).clamp(max=len(steps) - 1)
        low_B = (high_B - 1).clamp(min=0)
        width_B = (steps[high_B] - steps[low_B]).clamp(min=1e-6)
        return low_B, high_B, ((self.t_B - steps[low_B]) / width_B).clamp(0, 1)

    def nearest(self, t: Tensor | float) -> Tensor:
        """int64 `[B]`: the entry nearest to each timestep."""
        t_B = torch.as_tensor(t).reshape(-1).float()
        return (t_B[:, None] - torch.tensor(self.steps, device=t_B.device)).abs().argmin(1)

    def by_token(self, tokens: int, device: torch.device) -> Tensor:
        """int64 `[T]`: the entry of every token of a layer's input, whose samples lie one after the other."""
        if self.entry_B is None:
            raise ConfigError("a layer with input ranges by timestep ran outside its network, so it knows no timestep")
        return self.spread(self.entry_B, tokens, device)

    def spread(self, value_B: Tensor, tokens: int, device: torch.device) -> Tensor:
        """`[T, ...]`: what each sample has, for every token of a layer's input."""
        samples = value_B.shape[0]
        if tokens % samples:
            raise ConfigError(f"{samples} timesteps do not go with {tokens} tokens: one for all samples, or one each")
        return value_B.to(device).repeat_interleave(tokens // samples, 0)

    def watch(self, root: nn.Module) -> None:
        """Read the timestep whenever this network runs, in place of any other clock.

        Raises:
            UnsupportedModel: its forward takes none.
        """
        names = parameters_of(root)
        self.positions = {n: names.index(n) for n in (NAME, CLASSES) if n in names}
        unwatch(root)
        root.register_forward_pre_hook(self, with_kwargs=True)


def parameters_of(root: nn.Module) -> list[str]:
    """Names of the arguments of a network's forward, in order.

    Raises:
        UnsupportedModel: there is no timestep among them.
    """
    names = list(inspect.signature(type(root).forward).parameters)[1:]  # an offloading hook hides the instance's
    if NAME not in names:
        raise UnsupportedModel(f"{type(root).__name__}.forward takes no `{NAME}`, which input ranges are to follow")
    return names


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
    classes = [m.clock.classes for m in timed if m.clock.classes]  # type: ignore[union-attr]
    if len(set(classes)) > 1:
        raise CheckpointError("the layers' stored features have different classes; the config is damaged")
    clock = Clock(timed[0].clock.steps, *classes[:1])  # type: ignore[union-attr, arg-type]
    for module in timed:
        if module.clock.steps != clock.steps:  # type: ignore[union-attr]
            raise CheckpointError("the layers' tables of input ranges have different timesteps; the config is damaged")
        module.clock = clock  # type: ignore[assignment]
    clock.watch(root)
