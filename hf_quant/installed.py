"""What installed packages bring, by entry points. A package that is broken takes nobody else with it."""

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)
_broken: dict[tuple[str, str], str] = {}  # (group, name) -> what went wrong, told once


def brought(group: str, read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of the values of a group's entry points; one that cannot be loaded or read is a warning."""
    values = []
    for entry in entry_points(group=group):
        try:
            values.append(read(entry.load()))
        except Exception as error:  # whatever a module raises when it is imported
            owner = entry.dist.name if entry.dist is not None else "?"
            told = f"{entry.value} of the package {owner} ({type(error).__name__}: {error})"
            if (group, entry.name) not in _broken:
                _log.warning("cannot load %s; what it brings is missing", told)
            _broken[group, entry.name] = told
    return values


def tuples_of(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    """Reads a tuple of such values."""

    def read(value: Any) -> tuple[Any, ...]:  # noqa: ANN401  what an entry point names
        if not isinstance(value, tuple | list) or not all(isinstance(item, kind) for item in value):
            raise TypeError(f"a tuple of {kind.__name__} is wanted, not {type(value).__name__}")
        return tuple(value)

    return read


def broken(group: str) -> str:
    """`; not loaded: ...` about the entry points of a group that could not be, or nothing."""
    told = [what for (of, _), what in sorted(_broken.items()) if of == group]
    return "; not loaded: " + ", ".join(told) if told else ""
