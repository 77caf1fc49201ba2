"""Which cells of two views show the same, and where exactly.

Coarse: descriptors of all cells of one view against all of the other, softmax in both directions
(dual softmax, as in LoFTR: Sun et al., CVPR 2021); matches are those that are each other's best.
Fine: around the cell that was found, a finer descriptor of the point is compared with those of a
window of 4 px steps; a small network reads offset and standard deviation from these likenesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.ray_stem import CELL, FINE_STRIDE, cell_pixels

MIN_PROBABILITY = 0.02  # of a match, both directions together; lower ones are mostly wrong
RADIUS = 3  # of the window, in steps of FINE_STRIDE
WIDTH, DIM = 64, 32
LARGEST_LOG_DEVIATION = 3.0
ROUNDS = 2  # the second begins where the first ended


@dataclass(frozen=True)
class CellMatches:
    """M matches of two views: pixels [M, 2] in both, deviation [M] px of the second."""

    pixels_i: torch.Tensor
    pixels_j: torch.Tensor
    deviation: torch.Tensor


class FineMatcher(nn.Module):
    """Where a point of one view lies in another, about a coarse position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, WIDTH, 1)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out = nn.Conv2d(WIDTH, DIM, 3, padding=1)
        likenesses = (2 * RADIUS + 1) ** 2
        last = nn.Linear(128, 3)
        nn.init.normal_(last.weight, std=0.005)
        self.read = nn.Sequential(nn.Linear(likenesses + DIM, 128), nn.GELU(),
                                  nn.Linear(128, 128), nn.GELU(), last)
        self.log_sharpness = nn.Parameter(torch.tensor(2.7))

    def described(self, fine: torch.Tensor) -> torch.Tensor:
        """Fine maps of the stem [V, C, h, w] -> descriptors float32 [V, DIM, h, w], length 1."""
        x = F.gelu(self.mix(F.gelu(self.reduce(fine))))
        return F.normalize(self.out(x).float(), dim=1)

    def forward(self, maps: torch.Tensor, views: tuple[torch.Tensor, torch.Tensor],
                pixels_i: torch.Tensor, about_j: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [M, 2] in views j of points in views i, and the logarithm of their deviation [M].

        maps: descriptors [V, DIM, h, w] of all views. views: numbers i and j [M] of them.
        pixels_i [M, 2]: the points; about_j [M, 2]: about where they are.
        """
        steps = _window(maps.device)
        query = _read(maps, views[0], pixels_i[:, None])[:, 0]
        near = _read(maps, views[1], about_j[:, None] + steps)
        alike = torch.einsum('md,mkd->mk', query, near)
        share = (alike * self.log_sharpness.exp()).softmax(-1)
        said = self.read(torch.cat([4 * alike, 2 * query], -1)).float()
        offset = share @ steps + FINE_STRIDE * said[:, :2]
        return about_j + offset, said[:, 2].clamp(-LARGEST_LOG_DEVIATION, LARGEST_LOG_DEVIATION)


def coarse_matches(descriptors: tuple[torch.Tensor, torch.Tensor], sharpness: float,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [M, 2] of cells of view i, and about where view j shows the same.

    descriptors: [D, h, w] of both views.
    """
    first, second = descriptors
    grid_hw = (second.shape[-2], second.shape[-1])
    logits = sharpness * first.flatten(1).T @ second.flatten(1)
    towards_j = logits.softmax(1)
    both = towards_j * logits.softmax(0)
    j = both.argmax(1)
    i = torch.arange(len(j), device=j.device)
    i = i[(both.argmax(0)[j] == i) & (both[i, j] > MIN_PROBABILITY)]
    pixels = cell_pixels((CELL * first.shape[-2], CELL * first.shape[-1]), j.device)
    return pixels[i], _expected(towards_j[i], j[i], grid_hw)


def _expected(share: torch.Tensor, cell: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Mean pixel [M, 2] of shares [M, h * w] over the 3 x 3 cells around the best one [M]."""
    pixels = cell_pixels((CELL * grid_hw[0], CELL * grid_hw[1]), share.device)
    near = ((pixels - pixels[cell][:, None]).abs() < 1.5 * CELL).all(-1)
    weight = torch.where(near, share, 0)
    return weight @ pixels / weight.sum(1, keepdim=True)


def matched(matcher: FineMatcher, descriptors: torch.Tensor, fine: torch.Tensor,
            pair: tuple[int, int], sharpness: float) -> CellMatches:
    """Matches of two views, of descriptors [N, D, h, w] and fine ones [N, DIM, 2 h, 2 w]."""
    pixels_i, pixels_j = coarse_matches((descriptors[pair[0]], descriptors[pair[1]]), sharpness)
    both = fine[list(pair)]  # reading makes a table of all views that it is given
    views = tuple(torch.full((len(pixels_i),), view, device=fine.device) for view in (0, 1))
    log_deviation = pixels_j.new_zeros(len(pixels_j))
    for _ in range(ROUNDS):
        pixels_j, log_deviation = matcher(both, (views[0], views[1]), pixels_i, pixels_j)
    return CellMatches(pixels_i, pixels_j, log_deviation.exp())


def _window(device: torch.device) -> torch.Tensor:
    """Steps [K, 2] px of the window around a position."""
    line = FINE_STRIDE * torch.arange(-RADIUS, RADIUS + 1.0, device=device)
    y, x = torch.meshgrid(line, line, indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)


def _read(maps: torch.Tensor, view: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Bilinear values [M, K, C] of maps [V, C, h, w] of views [M] at pixels [M, K, 2]."""
    _, channels, height, width = maps.shape
    last = torch.tensor([width, height], device=maps.device) - 1.001
    at = (pixels / FINE_STRIDE).clamp(min=0).minimum(last)
    corner, share = at.long(), (at - at.floor())[..., None]
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    row = (view[:, None] * height + corner[..., 1]) * width + corner[..., 0]
    x, y = share.unbind(-2)  # [M, K, 1] each
    weight = torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y])
    around = torch.stack([row, row + 1, row + width, row + width + 1])
    return (table[around] * weight).sum(0)  # read at once: backwards, each read costs a table
