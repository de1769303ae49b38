"""Helpers for tests of methods, ours and other people's. Fixtures: `hf_quant.testing.fixtures`."""

from hf_quant.testing.claims import Claim, Claims
from hf_quant.testing.diffusion import DiffusionJudge
from hf_quant.testing.judge import Judge
from hf_quant.testing.outliers import inject_outliers

__all__ = ["Claim", "Claims", "DiffusionJudge", "Judge", "inject_outliers"]
