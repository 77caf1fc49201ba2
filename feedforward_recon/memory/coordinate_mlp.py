"""The coordinate network: a descriptor in, the point of the map it belongs to out.

A residual MLP fitted at test time (scene coordinate regression in the manner of ACE, Brachmann
et al. 2023, on our own descriptors). It also says how far off it expects to be, in pixels,
so that the localizer can take its best answers first.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

LOG_SIGMA_RANGE = (-2.0, 7.0)


class CoordinateNetwork(nn.Module):
    """Descriptors [N, D] -> points [N, 3] in units of ``box_size`` and log sigma [N] (px)."""

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.entry = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList([
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)])
        self.exit = nn.Linear(hidden, 4)

    def forward(self, descriptors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map descriptors [N, D] to (points [N, 3], log sigma [N])."""
        x = self.entry(descriptors)
        for block in self.blocks:
            x = x + block(F.relu(x))
        out = self.exit(F.relu(x).float())
        return out[:, :3], out[:, 3].clamp(*LOG_SIGMA_RANGE)
