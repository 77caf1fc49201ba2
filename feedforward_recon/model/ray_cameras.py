"""Poses and depth of the views that a `RayTransformer` describes.

Poses are from matches, else from world points; depth is bent to where matches meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.depth_correction import corrected_views, sparse_depths
from feedforward_recon.geometry.transforms import hat, inverse, so3_exp
from feedforward_recon.geometry.view_graph import PlacedViews, ViewPair, placed_views
from feedforward_recon.model.cell_matching import matched
from feedforward_recon.model.ray_stem import CELL, cell_pixels
from feedforward_recon.model.ray_transformer import CellMaps, RayTransformer
from feedforward_recon.model.seconds import Seconds

ALL_PAIRS = 10  # with more views only pairs that look alike are compared
# Of each view then, in order of likeness: in a walk the most alike are so near that they say
# little of depth, and a chain of them drifts (docs/experiments.md).
RANKS = (0, 1, 2, 4, 8, 16)
MANY = 64  # of more views no table of all parts with all parts is made: one vector stands for each
BLOCK = 256  # views that are then compared with all at once
SHARPEST = 20.0  # of the words that a cell counts for, as in the global descriptor of the encoder
COARSE_CELLS = 4  # cells that are one when views are compared as wholes
STEPS = 10  # of a pose from world points
WIDE = 0.03  # angle in radians from which their errors count less


class ViewGeometry(NamedTuple):
    """T_world_cam [B, N, 4, 4] of views and log depth [B, N, h, w] of their cells, in one unit."""

    T_world_cam: torch.Tensor
    log_depth: torch.Tensor


@dataclass(frozen=True)
class GeometryWork:
    """How poses are worked out. mapped: like ``map``, over pairs or views; seconds: of parts."""

    mapped: Callable[..., Iterable] = map
    seconds: Seconds = field(default_factory=Seconds)


def geometry_of(cells: CellMaps, K: torch.Tensor, network: RayTransformer, *, first: bool,
                work: GeometryWork | None = None) -> ViewGeometry:
    """Poses and depth of views with K [B, N, 3, 3].

    first: the first view is the world, and views are matched with each other. Without, all are
    queries of a scene that was written before, whose world their points are in. Time and memory
    are linear in N, but for one product of each two views' vectors.
    """
    work = work or GeometryWork()
    windows = [_matched_window(cells, index, _float64(K[index]), network, work) if first
               else _queries(cells, index, _float64(K[index])) for index in range(len(K))]
    poses, log_depth = (torch.from_numpy(np.stack(x)) for x in zip(*windows, strict=True))
    return ViewGeometry(poses.to(K), log_depth.to(cells.log_depth))


def _matched_window(cells: CellMaps, index: int, K: np.ndarray, network: RayTransformer,
                    work: GeometryWork) -> tuple[np.ndarray, np.ndarray]:
    """Poses [N, 4, 4], log depth [N, h, w]; world points say poses that matches leave open."""
    focal_px, log_depth = float(K[0, 0, 0]), _float64(cells.log_depth[index])
    with work.seconds.of('matching'):
        pairs = _pairs(cells, index, K, log_depth, network, work.mapped)
    with work.seconds.of('poses'):
        views = placed_views(pairs, len(K), focal_px, mapped=work.mapped)
        views = _all_placed(views, cells, index, K)
    with work.seconds.of('depth'):
        seen = [replace(points, xy=_cell(points.xy * k[[0, 1], [0, 1]] + k[:2, 2]))
                for points, k in zip(sparse_depths(pairs, views, focal_px), K, strict=True)]
        return views.T_world_view, np.stack(corrected_views(list(log_depth), seen, work.mapped))


def _all_placed(views: PlacedViews, cells: CellMaps, index: int, K: np.ndarray) -> PlacedViews:
    """The views, those that are not placed where their world points say."""
    left = np.flatnonzero(~views.placed)
    if not len(left):
        return views
    said = _queries(cells, index, K, [0, *left.tolist()])[0]
    T = views.T_world_view.copy()
    T[left] = inverse(said[0]) @ said[1:]
    return PlacedViews(T, views.placed)


def _queries(cells: CellMaps, index: int, K: np.ndarray, among: Sequence[int] | None = None
             ) -> tuple[np.ndarray, np.ndarray]:
    """Poses of all or some views from world points [n, 4, 4], and log depth [N, h, w] of all."""
    log_depth = _float64(cells.log_depth[index])
    points, sure = (x[index].flatten(1, 2) for x in (cells.points, cells.points_confidence))
    said = [pose_from_points(_float64(points[view]), _rays(K[view], log_depth[view].shape),
                             np.exp(log_depth[view]).ravel(), _float64(sure[view]))
            for view in (range(len(K)) if among is None else among)]
    return np.stack(said), log_depth


def _pairs(cells: CellMaps, index: int, K: np.ndarray, log_depth: np.ndarray,
           network: RayTransformer, mapped: Callable[..., Iterable]) -> list[ViewPair]:
    """Matches of the views of one window that may show the same."""
    descriptors, fine = cells.descriptors[index], cells.fine[index]
    sharpness = float(network.log_sharpness.exp())

    def matching(pair: tuple[int, int]) -> ViewPair:
        i, j = pair
        with torch.inference_mode():  # of each thread its own
            same = matched(network.fine_matcher, descriptors, fine, pair, sharpness)
        pixels_i, pixels_j, deviation = (_float64(x) for x in (
            same.pixels_i, same.pixels_j, same.deviation))
        depth = np.exp(map_coordinates(log_depth[i], _cell(pixels_i)[:, ::-1].T, order=1,
                                       mode='nearest'))
        return ViewPair(i, j, _normalised(pixels_i, K[i]), _normalised(pixels_j, K[j]),
                        deviation / K[j, 0, 0], depth)

    return list(mapped(matching, similar_pairs(descriptors, network.stem.network.words)))


def similar_pairs(descriptors: torch.Tensor, words: torch.Tensor) -> Sequence[tuple[int, int]]:
    """Pairs of views worth matching, of their descriptors [N, D, h, w].

    All of few views. Of many, each with some of those whose parts find similar parts there: the
    most similar ones, and ever fewer of the others. Beyond ``MANY`` views, likeness is that of
    one vector per view, of residuals of its cells to words [W, D].
    """
    count = len(descriptors)
    if count <= ALL_PAIRS:
        return list(combinations(range(count), 2))
    ranks = [rank for rank in RANKS if rank < count - 1]
    others = (_by_parts(descriptors, ranks) if count <= MANY
              else _by_vectors(_vectors(descriptors, words), ranks)).tolist()
    return sorted({(min(i, j), max(i, j)) for i, row in enumerate(others) for j in row})


def _by_parts(descriptors: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Of each view the others [N, R] of some ranks, by their parts."""
    parts = F.normalize(F.avg_pool2d(descriptors, COARSE_CELLS, ceil_mode=True).flatten(2), dim=1)
    alike = torch.stack([torch.einsum('dp,ndq->npq', view, parts).amax(2).mean(1)
                         for view in parts])
    alike = (alike + alike.T).fill_diagonal_(-1)
    return alike.argsort(1, descending=True)[:, ranks]


def _by_vectors(vectors: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """The same by vectors [N, G] of length 1; some rows of the table of likenesses at a time."""
    found = []
    for start in range(0, len(vectors), BLOCK):
        alike = vectors[start:start + BLOCK] @ vectors.T
        alike.diagonal(start).fill_(-2)
        found.append(alike.topk(max(ranks) + 1, 1).indices[:, ranks])
    return torch.cat(found)


def _vectors(descriptors: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Unit vectors [N, W * D] of views: VLAD (Jegou et al. 2010), intra-normalised."""
    found = []
    for view in descriptors.flatten(2):  # [D, cells]
        assign = torch.softmax(SHARPEST * words @ view, 0)
        residual = assign @ view.T - assign.sum(1)[:, None] * words
        found.append(F.normalize(F.normalize(residual, dim=-1).flatten(), dim=0))
    return torch.stack(found)


def pose_from_points(points: np.ndarray, rays: np.ndarray, depth: np.ndarray, sure: np.ndarray
                     ) -> np.ndarray:
    """The pose T_world_cam [4, 4] of a camera that sees points [M, 3] of the world along its rays.

    rays: [M, 3] with z = 1; depth [M] along z, in the unit of the points; sure [M]: weights. In
    closed form from points and depths, then from the directions alone: Gauss-Newton.
    """
    T = inverse(align_points(depth[:, None] * rays, points, sure, with_scale=False
                             ).T_target_source)
    unit = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    for _ in range(STEPS):
        seen = points @ T[:3, :3].T + T[:3, 3]
        length = np.maximum(np.linalg.norm(seen, axis=1), 1e-3)
        towards = seen / length[:, None]
        error = towards - unit
        weight = sure / (1 + (error ** 2).sum(1) / WIDE ** 2)
        across = (np.eye(3) - towards[:, :, None] * towards[:, None]) / length[:, None, None]
        J = np.concatenate([-across @ hat(seen), across], 2)
        A = np.einsum('mri,m,mrj->ij', J, weight, J)
        step = -np.linalg.solve(A + 1e-6 * np.trace(A) / 6 * np.eye(6),
                                np.einsum('mri,m,mr->i', J, weight, error))
        turn = so3_exp(step[:3])
        T = np.block([[turn @ T[:3, :3], (turn @ T[:3, 3] + step[3:])[:, None]],
                      [np.array([[0.0, 0.0, 0.0, 1.0]])]])
    return inverse(T)


def pixel_maps(log_depth: torch.Tensor, confidence: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and confidence [B, N, H, W] of all pixels, of those of cells [B, N, h, w]."""
    depth, sure = (F.interpolate(x, scale_factor=CELL, mode='bilinear', align_corners=False)
                   for x in (log_depth, confidence))
    return depth.exp(), sure


def _rays(K: np.ndarray, grid_hw: tuple[int, ...]) -> np.ndarray:
    pixels = cell_pixels((CELL * grid_hw[0], CELL * grid_hw[1])).double().numpy()
    return np.column_stack([_normalised(pixels, K), np.ones(len(pixels))])


def _normalised(pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    return (pixels - K[:2, 2]) / K[[0, 1], [0, 1]]


def _cell(pixels: np.ndarray) -> np.ndarray:
    """Places [M, 2] on the grid of cells, the middle of the first at 0."""
    return (pixels - (CELL - 1) / 2) / CELL


def _float64(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.detach().double().cpu().numpy())
