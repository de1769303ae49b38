"""Helpers for tests of methods, ours and other people's."""

from hf_quant.testing.claims import Claim, Claims
from hf_quant.testing.outliers import inject_outliers

__all__ = ["Claim", "Claims", "inject_outliers"]
