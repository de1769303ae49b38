"""Room for products whose K is cut into parts: sums of the parts, and the tickets by which the last one is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

TICKETS = 1 << 20  # of a device


@dataclass(slots=True, eq=False)
class Ring:
    """Zeros, some for each launch in turn: launches that run at the same time have different ones.

    Every launch leaves its own as zeros, so a captured graph can run again. They come round after hundreds of launches.
    """

    zeros: Tensor
    next: int = 0

    def take(self, count: int) -> Tensor:
        """So many zeros."""
        start = 0 if self.next + count > TICKETS else self.next
        self.next = start + -(-count // 32) * 32  # aligned
        return self.zeros[start : start + count]


RINGS: dict[torch.device, Ring] = {}


def parts_of(grid: tuple[int, int, int], tile: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 parts `[tiles, splits, BN, BM]`, zeros `[tiles]`) for a launch on a grid `(M, N, splits)`.

    In a graph that is captured before any eager launch the graph itself writes the zeros.
    """
    tiles = grid[0] * grid[1]
    parts = torch.empty(tiles, grid[2], *tile, dtype=torch.float32, device=device)
    if (device not in RINGS and device.type == "cuda" and torch.cuda.is_current_stream_capturing()) or tiles > TICKETS:
        return parts, torch.zeros(tiles, dtype=torch.int32, device=device)
    if device not in RINGS:
        RINGS[device] = Ring(torch.zeros(TICKETS, dtype=torch.int32, device=device))
    return parts, RINGS[device].take(tiles)
