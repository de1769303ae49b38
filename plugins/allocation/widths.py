"""The widths that the methods here choose from: those of a budget, and the one that was asked for."""

from hf_quant.allocation.budget import WIDTHS
from hf_quant.spec import Spec, int_spec


def integers(bits: int, group_size: int, symmetric: bool = False) -> tuple[Spec, ...]:
    """Integer grids by rising width; with `bits` among them the size of `bits` everywhere can be reached."""
    return tuple(int_spec(width, group_size, symmetric=symmetric) for width in sorted({*WIDTHS, bits}))
