"""Install: put what was solved into the model in place of the float layer."""

import torch
from torch import nn

from hf_quant.plan import SitePlan
from hf_quant.runtime.embedding import retie
from hf_quant.runtime.install import install_embedding, install_linear
from hf_quant.runtime.packed import Packed
from hf_quant.solve import Solved


def install(model: nn.Module, plan: SitePlan, solved: Solved, dtype: torch.dtype | None = None) -> Packed:
    """Replace the site's module (and, for an embedding, the modules that are tied to it); returns the new one.

    Args:
        dtype: compute type; None: that of the float weight.
    """
    if plan.site.kind == "embedding":
        table = install_embedding(model, plan.site.name, solved.q, plan.format, shares=plan.shares)
        if plan.shares:
            retie(model)
        return table
    return install_linear(
        model,
        plan.site.name,
        solved.q,
        plan.format,
        inputs=solved.inputs,
        input_range=solved.input_range,
        branches=solved.branches,
        dtype=dtype,
    )
