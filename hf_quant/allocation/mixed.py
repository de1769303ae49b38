"""Mixed precision: the recipe of a method whose bits an allocator chooses site by site, for a budget."""

from dataclasses import replace
from typing import Any

from hf_quant.allocation.budget import Budget
from hf_quant.errors import ConfigError
from hf_quant.method import Method, method_named
from hf_quant.recipe import Recipe
from hf_quant.stages.allocator import Allocator

DEFAULT = "mixed"  # the method whose sensitivity and search choose, unless another is named


def budgeted(method: Method, given: dict[str, Any], budget: Budget) -> Recipe:
    """`method(**given)` with an allocator over `budget.widths`; the method's solver and all else stay.

    Raises:
        ConfigError: `bits` was given as well, or the method's bits cannot vary.
    """
    if "bits" not in method.signature.parameters:
        raise ConfigError(f"method {method.id!r} has one width only, so a budget cannot choose it; leave budget out")
    if "bits" in given:
        raise ConfigError(f"bits={given['bits']!r} and budget={budget.size!r} both say how many bits: give one of them")
    recipe = _recipe(method, given, budget)
    by_width = _by_width(method, given, budget)
    allocator = recipe.allocator if budget.by is None else None
    if allocator is None:
        allocator = _allocator_of(budget.by or DEFAULT)
    if any(replace(r, weights=recipe.weights, allocator=recipe.allocator) != recipe for r in by_width):
        raise ConfigError(f"method {method.id!r} does more than round otherwise at another width, so bits cannot vary")
    choices = tuple(r.weights for r in by_width)
    return replace(recipe, allocator=replace(allocator, choices=choices, budget=budget))


def _by_width(method: Method, given: dict[str, Any], budget: Budget) -> list[Recipe]:
    """The recipes of the widths that the method takes."""
    made: list[Recipe] = []
    refusal: ConfigError | None = None
    for width in budget.widths:
        try:
            made.append(_recipe(method, {**given, "bits": width}, budget))
        except ConfigError as error:
            refusal = error
    if not made:
        raise ConfigError(f"method {method.id!r} takes none of the widths {list(budget.widths)}: {refusal}")
    return made


def _recipe(method: Method, given: dict[str, Any], budget: Budget) -> Recipe:
    made = method.build(**method.arguments(given))
    if not isinstance(made, Recipe):
        raise ConfigError(f"method {method.id!r} is no recipe of stages, so a budget cannot choose its bits")
    if made.splitter or made.repairs:
        raise ConfigError(
            f"method {method.id!r} stores branches beside its codes, which a budget of {budget.size} cannot foresee; "
            "give bits instead"
        )
    return made


def _allocator_of(method_id: str) -> Allocator:
    """The allocator of a method's recipe with its default arguments.

    Raises:
        ConfigError: no such method, or it allocates nothing.
    """
    found = method_named(method_id)
    made = found.build(**found.arguments({}))
    if not isinstance(made, Recipe) or made.allocator is None:
        raise ConfigError(f"budget by={method_id!r}: this method does not choose bits; mixed is one that does")
    return made.allocator
