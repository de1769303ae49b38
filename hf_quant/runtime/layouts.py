"""Layouts: what a kernel makes of the canonical tensors is made when it is first needed, not when a model is loaded.

A model that is loaded to be saved, moved or trained elsewhere then costs no second copy of its codes. A compiled model
cannot make them while it is traced, so all that are missing are made right before torch compiles anything.
"""

import weakref
from typing import Any, Protocol


class Waiting(Protocol):
    """A module whose layout may not be made yet."""

    def lay_out(self) -> None:
        """Make it now, where it is missing."""


_waiting: "weakref.WeakSet[Any]" = weakref.WeakSet()


def expect(module: Waiting) -> None:
    """Make the module's layout before any compilation, if its own forward has not by then."""
    _listen()
    _waiting.add(module)


def _listen() -> None:
    """Anew each time: `torch._dynamo.reset()` forgets who listens. After one, a compiled model runs the reference."""
    from torch._dynamo.callback import callback_handler

    if _lay_out_all not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_lay_out_all)


def _lay_out_all(*_: object) -> None:
    for module in list(_waiting):
        module.lay_out()
