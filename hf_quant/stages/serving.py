"""Serving: what does a diffusion model store of what its layers compute from the timestep (and class) alone?"""

from typing import Protocol

from torch import Tensor

from hf_quant.spec import Spec


class Serving(Protocol):
    """Outputs of layers that depend on the timestep alone are stored; layers that nothing needs any more are dropped.

    Done before the blocks are, which then see what is stored.
    """

    @property
    def values(self) -> Spec:
        """How a layer's outputs `[entries classes, N]` are stored."""

    @property
    def entries(self) -> int:
        """How many timesteps have stored outputs: as many as tables of input ranges have, where there are any."""

    @property
    def classes(self) -> int:
        """With more of them in the data nothing is stored."""

    def keeps(self, wanted_ECN: Tensor, stored_ECN: Tensor, own_ECN: Tensor) -> Tensor:
        """bool `[entries]`: where a layer goes on computing.

        Args:
            wanted_ECN: its outputs in full precision, by entry and class.
            stored_ECN: as they would be stored.
            own_ECN: as the quantized layer computes them.
        """
