"""DA3's dense head: one set of maps, fused twice, for depth and for rays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from feedforward_recon.model.dpt import (
    TAIL,
    DptConfig,
    DptHead,
    FusionBlock,
    Scratch,
    with_directions,
)

RAY = 7
LEVELS = 4


class Permute(nn.Module):
    """Axes in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        return x.permute(self.order)


class DualScratch(Scratch):
    """Two fusions. The four read-outs of rays share one LayerNorm; only the last is used."""

    def __init__(self, config: DptConfig) -> None:
        super().__init__(config, outputs=2)
        norm = nn.LayerNorm(TAIL)
        for level in range(1, LEVELS + 1):
            self.add_module(f'refinenet{level}_aux', FusionBlock(config, level < LEVELS))
        self.output_conv1_aux = nn.ModuleList(
            [_five_convolutions(config.features) for _ in range(LEVELS)])
        self.output_conv2_aux = nn.ModuleList(
            [_ray_tail(config.features // 2, norm) for _ in range(LEVELS)])


class DualDptHead(DptHead):
    """Depth and confidence per pixel; rays and their confidence on a coarser grid."""

    scratch: DualScratch

    def __init__(self, config: DptConfig) -> None:
        super().__init__(config, DualScratch(config))

    def forward(self, levels: Sequence[torch.Tensor],  # type: ignore[override]
                grid_hw: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens of four layers, each [B, h * w, C] -> depth and rays, before activation.

        Depth [B, H, W, 2] and rays [B, 8 h, 8 w, 7].
        """
        maps = self.level_maps(levels, grid_hw)
        depth = self.per_pixel(self.fuse(maps, 'refinenet{}'), grid_hw)
        rays = self.scratch.output_conv1_aux[-1](self.fuse(maps, 'refinenet{}_aux'))
        rays = self.scratch.output_conv2_aux[-1](with_directions(rays, grid_hw))
        return depth, rays.permute(0, 2, 3, 1)


def _five_convolutions(features: int) -> nn.Sequential:
    widths = (features, features // 2) * 3
    return nn.Sequential(*[nn.Conv2d(a, b, 3, padding=1)
                           for a, b in zip(widths, widths[1:], strict=False)])


def _ray_tail(width: int, norm: nn.LayerNorm) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, TAIL, 3, padding=1), Permute(0, 2, 3, 1), norm,
                         Permute(0, 3, 1, 2), nn.ReLU(), nn.Conv2d(TAIL, RAY, 1))
