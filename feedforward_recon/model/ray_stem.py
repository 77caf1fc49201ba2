"""What the compact encoder sees of an image, for the transformer that starts from it.

The pyramid of the compact encoder was trained on real photos to tell scene points apart. It is
kept as it is: a transformer on top of it begins with matches that are right three times out of
four. An image is cut into patches of 16 pixels of 2 x 2 cells each; everything that is said about
an image is said at the middles of the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.compact import (
    STRIDES,
    CompactNetwork,
    CompactShape,
    load_compact,
    shipped_compact,
)

PATCH, CELL = 16, 8
CELLS = (PATCH // CELL) ** 2  # of a patch
FINE_STRIDE = 4  # pixel p lies at p / 4 of maps of this stride


@dataclass(frozen=True)
class StemMaps:
    """What the stem says of V images of H x W pixels.

    columns: [V, T, CELLS, D + C], of each cell of a patch the pyramid and the descriptor.
    descriptors: [V, T, CELLS, D], the last part of it, of length 1.
    fine: [V, F, H / 4, W / 4], the finest levels side by side.
    """

    columns: torch.Tensor
    descriptors: torch.Tensor
    fine: torch.Tensor


class RayStem(nn.Module):
    """The pyramid of the compact encoder, never trained, in float32 or as autocast says."""

    def __init__(self, shape: CompactShape) -> None:
        super().__init__()
        self.network = CompactNetwork(shape).requires_grad_(False).eval()
        self.channels = sum(shape.widths) + shape.dim
        self.fine_channels = shape.stem + shape.widths[0] + shape.widths[1]

    @staticmethod
    def shipped() -> RayStem:
        """The stem of the encoder that is shipped with the package."""
        network = load_compact(shipped_compact())
        stem = RayStem(network.shape)
        stem.network.load_state_dict(network.state_dict())
        return stem

    def train(self, mode: bool = True) -> RayStem:
        """The norms keep what they have learnt of photos."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> StemMaps:
        """Images [V, 3, H, W] in 0..1, whose sides are multiples of a patch."""
        first, maps = self.network.levels_of(images.contiguous(memory_format=torch.channels_last))
        pyramid = torch.cat([_at_cells(level.float(), stride, images.shape[-2:])
                             for level, stride in zip(maps, STRIDES, strict=True)], -1)
        descriptors = F.normalize(self.network.head(pyramid)[..., :-1].float(), dim=-1)
        columns = by_patch(torch.cat([pyramid, descriptors], -1))
        return StemMaps(columns, columns[..., -descriptors.shape[-1]:], _fine(first, maps))


def by_patch(cells: torch.Tensor) -> torch.Tensor:
    """Cells [V, 2 h, 2 w, C] -> [V, h * w, CELLS, C], those of a patch together, row by row."""
    patches = cells.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [V, h, 2, w, 2, C]
    return patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def as_maps(patches: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """[..., h * w, CELLS, C] -> maps [..., C, 2 h, 2 w], the other way round."""
    maps = patches.unflatten(-2, (2, 2)).unflatten(-4, grid_hw)  # [..., h, w, 2, 2, C]
    return maps.movedim(-1, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def cell_pixels(size_hw: tuple[int, int], device: torch.device | None = None,
                step: int = CELL) -> torch.Tensor:
    """Pixels (x, y) [h * w, 2] of the middles of the cells of an image, row by row."""
    rows, columns = (torch.arange(n // step, device=device) * step + (step - 1) / 2
                     for n in size_hw)
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)


def _at_cells(level: torch.Tensor, stride: int, size_hw: torch.Size) -> torch.Tensor:
    """A level [V, C, h, w], whose entry i stands at pixel ``stride`` i, at cells [V, y, x, C].

    Bilinear. Cells stand in rows and columns, so one product after the other does it.
    """
    rows, columns = (_shares(size // CELL, entries, stride, level.device)
                     for size, entries in zip(size_hw, level.shape[-2:], strict=True))
    with torch.autocast(level.device.type, enabled=False):
        values = rows @ level.permute(0, 2, 3, 1).flatten(2)  # [V, y, w * C]
        return columns @ values.unflatten(2, (level.shape[-1], -1))


def _shares(cells: int, entries: int, stride: int, device: torch.device) -> torch.Tensor:
    """How much each of the entries of a line counts at each of its cells, [cells, entries]."""
    at = (torch.arange(cells, device=device) * CELL + (CELL - 1) / 2) / stride
    apart = at.clamp(max=entries - 1)[:, None] - torch.arange(entries, device=device)
    return (1 - apart.abs()).clamp(min=0)


def _fine(first: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    half, quarter, eighth = first, maps[0], maps[1]
    height, width = quarter.shape[-2:]
    up = F.interpolate(eighth, scale_factor=2, mode='bilinear', align_corners=False)
    return torch.cat([quarter, up[..., :height, :width], half[..., ::2, ::2]], 1)
