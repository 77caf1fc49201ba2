"""Losses of a `RayTransformer`: depth, world points, poses that follow from them, and matches.

Lengths count relative to the scene: each window is brought to one scale before it is compared.
Errors count by a confidence C of at least 1 (Kendall and Gal 2017; DUSt3R): C e - 0.2 log C + e.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from feedforward_recon.model.cell_matching import FineMatcher
from feedforward_recon.model.ray_stem import CELL, PATCH, cell_pixels
from feedforward_recon.model.ray_transformer import SPECIAL, CellMaps, RayTransformer
from feedforward_recon.training.aligning_rotation import aligning_rotation
from feedforward_recon.training.windows import Windows

SCALE_WEIGHT, GUIDE_WEIGHT, COARSE_WEIGHT, FINE_WEIGHT = 0.1, 0.06, 0.5, 0.3
CONFIDENCE_REWARD = 0.2
LARGE = 1.0  # error, relative to the depth, from which it counts by its logarithm
LARGEST_TURN = 1.5  # of the Frobenius norm between rotations: farther is equally wrong
FINE_SAMPLES, FINE_SPREAD_PX = 2000, 7.0


def task_losses(network: RayTransformer, cells: CellMaps, windows: Windows,
                generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All that a `RayTransformer` is trained for, each part with its weight."""
    parts = geometry_losses(cells, windows)
    if windows.seen.any():
        parts['coarse'] = coarse_loss(cells, windows, network.log_sharpness)
        parts['fine'] = fine_loss(network.fine_matcher, cells, windows, generator)
    return parts


def geometry_losses(cells: CellMaps, windows: Windows) -> dict[str, torch.Tensor]:
    """Losses of depth, points, scale, and of rotation and position of the views."""
    maps = torch.cat([cells.log_depth[..., None], cells.points,
                      cells.depth_confidence[..., None].log(),
                      cells.points_confidence[..., None].log()], -1).movedim(-1, 2)
    said = at_pixels(maps, windows.pixels)
    known, true = windows.known, windows.depth.log()
    count = known.flatten(1).sum(1).clamp(min=1)
    log_scale = ((true - said[..., 0]) * known).flatten(1).sum(1) / count  # [B]
    depth = (said[..., 0] + log_scale[:, None, None] - true).abs()
    distance = (windows.rays * windows.depth[..., None]).norm(dim=-1)
    moved = said[..., 1:4] * log_scale.exp()[:, None, None, None]
    point = _mild((moved - windows.points).norm(dim=-1) / distance)
    return {'depth': _confident(depth, said[..., 4].exp(), known),
            'point': _confident(point, said[..., 5].exp(), known),
            'scale': SCALE_WEIGHT * log_scale.abs().mean(),
            **_pose_losses(cells, windows, log_scale)}


def _pose_losses(cells: CellMaps, windows: Windows, log_scale: torch.Tensor
                 ) -> dict[str, torch.Tensor]:
    """Of the poses of all views but the first that fit depths to points in closed form."""
    size_hw = windows.images.shape[-2], windows.images.shape[-1]
    pixels = cell_pixels((size_hw[0], size_hw[1]), windows.K.device)
    focal = windows.K.diagonal(dim1=-2, dim2=-1)[:, 1:, None, :2]
    rays = F.pad((pixels - windows.K[:, 1:, None, :2, 2]) / focal, (0, 1), value=1.0)
    own = rays * cells.log_depth[:, 1:].flatten(2).exp()[..., None]
    R, t = rigid_fit(own, cells.points[:, 1:].flatten(2, 3),
                     cells.points_confidence[:, 1:].flatten(2))
    true = windows.T_world_cam[:, 1:]
    turn = (R - true[..., :3, :3]).flatten(2).norm(dim=-1)
    apart = (t * log_scale.exp()[:, None, None] - true[..., :3, 3]).norm(dim=-1)
    return {'turn': turn.clamp(max=LARGEST_TURN).mean(), 'place': _mild(apart).mean()}


def rigid_fit(source: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """R [..., 3, 3] and t [..., 3] that move points [..., P, 3] best to others."""
    share = (weights / weights.sum(-1, keepdim=True))[..., None]
    mean_source = (share * source).sum(-2, keepdim=True)
    mean_target = (share * target).sum(-2, keepdim=True)
    M = ((target - mean_target) * share).transpose(-1, -2) @ (source - mean_source)
    R = aligning_rotation(M.double()).to(source)
    return R, (mean_target - mean_source @ R.transpose(-1, -2))[..., 0, :]


def coarse_loss(cells: CellMaps, windows: Windows, log_sharpness: torch.Tensor) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018) of points against all cells of the other views.

    The four cells around the true position share the target, as in bilinear interpolation.
    """
    descriptors = cells.descriptors
    query = log_sharpness.exp() * F.normalize(at_pixels(descriptors, windows.queries), dim=-1)
    logits = torch.einsum('bimd,bjdt->bimjt', query, descriptors.flatten(3))
    seen, found = windows.seen.transpose(2, 3), windows.found.transpose(2, 3)
    logs = logits[seen].log_softmax(-1)  # [S, cells]
    rows, columns = descriptors.shape[-2:]
    at = (found[seen] - (CELL - 1) / 2) / CELL
    corner = at.floor()
    share = at - corner
    loss = logs.new_zeros(len(logs))
    for across in (0, 1):
        for down in (0, 1):
            x = (corner[:, 0] + across).long().clamp(0, columns - 1)
            y = (corner[:, 1] + down).long().clamp(0, rows - 1)
            weight = (share[:, 0] if across else 1 - share[:, 0]) \
                * (share[:, 1] if down else 1 - share[:, 1])
            loss = loss - weight * logs.gather(1, (y * columns + x)[:, None])[:, 0]
    return COARSE_WEIGHT * loss.mean()


def fine_loss(matcher: FineMatcher, cells: CellMaps, windows: Windows,
              generator: torch.Generator) -> torch.Tensor:
    """Error of fine matches that begin up to FINE_SPREAD_PX off, in their own deviations."""
    rows = windows.seen.nonzero()
    chosen = torch.randperm(len(rows), generator=generator)[:FINE_SAMPLES].to(rows.device)
    b, i, j, m = rows[chosen].unbind(1)
    true, views = windows.found[b, i, j, m], windows.images.shape[1]
    spread = 2 * torch.rand(len(b), 2, generator=generator).to(true) - 1
    said, log_deviation = matcher(cells.fine.flatten(0, 1), (b * views + i, b * views + j),
                                  windows.queries[b, i, m], true + FINE_SPREAD_PX * spread)
    error = (said - true).norm(dim=-1)
    return FINE_WEIGHT * (error * (-log_deviation).exp() + log_deviation).mean()


def guide_loss(compared: Mapping[int, tuple[torch.Tensor, torch.Tensor]], windows: Windows,
               all_views: Sequence[int], first_view: Sequence[int]) -> torch.Tensor:
    """Cross-entropy of attention that should find what a patch shows in other views.

    compared: of some global blocks queries and keys [B, h, N, P, d], scaled. all_views: heads
    whose softmax over each other view should find it there. first_view: heads whose softmax over
    all tokens should find it in the first view, which is the world.
    """
    columns = windows.images.shape[-1] // PATCH
    source, target = (_patch(x, columns) for x in (windows.queries, windows.found))
    seen, first = windows.seen, windows.seen[:, :, 0]
    losses = []
    for q, k in compared.values():
        for head in all_views:
            logits = torch.einsum('bimd,bjtd->bijmt', _rows(q[:, head, :, SPECIAL:], source),
                                  k[:, head, :, SPECIAL:])
            losses.append(F.cross_entropy(logits[seen].float(), target[seen]))
        for head in first_view:
            logits = torch.einsum('bimd,btd->bimt', _rows(q[:, head, :, SPECIAL:], source),
                                  k[:, head].flatten(1, 2))
            if first.any():
                losses.append(F.cross_entropy(logits[first].float(),
                                              SPECIAL + target[:, :, 0][first]))
    return GUIDE_WEIGHT * torch.stack(losses).sum()


def at_pixels(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Bilinear values [B, N, P, C] of maps of cells [B, N, C, h, w] at pixels [B, N, P, 2]."""
    size = torch.tensor([maps.shape[-1], maps.shape[-2]], device=maps.device)
    grid = 2 * (pixels - (CELL - 1) / 2) / CELL / (size - 1.0) - 1
    values = F.grid_sample(maps.flatten(0, 1), grid.flatten(0, 1)[:, None], align_corners=True,
                           padding_mode='border')
    return values[:, :, 0].transpose(1, 2).unflatten(0, maps.shape[:2])


def _rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, T, d] at index [B, N, M]."""
    return tokens.gather(2, index[..., None].expand(-1, -1, -1, tokens.shape[-1]))


def _patch(pixels: torch.Tensor, columns: int) -> torch.Tensor:
    """Number of the patch that pixels [..., 2] fall into."""
    x, y = (pixels / PATCH).long().unbind(-1)
    return y * columns + x


def _mild(error: torch.Tensor) -> torch.Tensor:
    return torch.where(error > LARGE, LARGE + error.clamp(min=1e-6).log(), error)


def _confident(error: torch.Tensor, confidence: torch.Tensor, known: torch.Tensor
               ) -> torch.Tensor:
    total = (confidence + 1) * error - CONFIDENCE_REWARD * confidence.log()
    return (total * known).sum() / known.sum().clamp(min=1)
