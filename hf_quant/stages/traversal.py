"""Traversal: which modules together, fed by which stream?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_quant.sites import SiteGroup


class Traversal(Protocol):
    """Orders the site groups of a block into waves; each wave is captured in one pass over the data."""

    def waves(self, groups: Sequence[SiteGroup]) -> list[list[SiteGroup]]:
        """Groups in order of execution -> waves. Later waves see the earlier ones already quantized."""


@dataclass(frozen=True, slots=True)
class Sequential:
    """One group after the other (q, k, v -> o -> gate, up -> down): each sees the error of those before it.

    Groups whose names differ in numbers only (the experts of a layer) do not feed each other and share a wave.
    """

    def waves(self, groups: Sequence[SiteGroup]) -> list[list[SiteGroup]]:
        """A wave a group, or a set of like groups, in order of first execution."""
        waves: dict[str, list[SiteGroup]] = {}
        for group in groups:
            waves.setdefault(re.sub(r"\d+", "#", group.sites[0].name), []).append(group)
        return list(waves.values())


@dataclass(frozen=True, slots=True)
class Blockwise:
    """All groups of a block from one pass: faster, blind to the error made inside the block."""

    def waves(self, groups: Sequence[SiteGroup]) -> list[list[SiteGroup]]:
        """One wave."""
        return [list(groups)]
