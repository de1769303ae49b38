"""The static range of an input, fitted on a sample of its rows as the range of a weight is."""

from dataclasses import dataclass

from torch import Tensor

from hf_quant.plugins.calibration.mse_clip import MseClip
from hf_quant.spec import Spec
from hf_quant.stages.range import Range
from hf_quant.stats import Rows, Stat, Stats


@dataclass(frozen=True, slots=True)
class SampledRange:
    """Any `Range` on `rows` rows: one scale (and zero point) for the tensor. Squared error by default."""

    range: Range = MseClip(steps=24, floor=0.3, power=2.0)
    rows: int = 128

    def needs(self, spec: Spec) -> tuple[Stat, ...]:
        """The rows."""
        return (Rows(self.rows),)

    def fit_inputs(self, stats: Stats, spec: Spec) -> tuple[Tensor, Tensor | None]:
        """See `InputRange.fit_inputs`."""
        rows = Rows(self.rows)
        return self.range.fit(rows.values(stats[rows]), spec)
