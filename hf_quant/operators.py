"""Operators that layers use besides their format's: each is a folder of `hf_quant.kernels` with `op.py`."""

import importlib


def need_operator(name: str) -> None:
    """Register `torch.ops.hf_quant.<name>` if it is not yet: imports its folder."""
    importlib.import_module(f"hf_quant.kernels.{name}.op")
