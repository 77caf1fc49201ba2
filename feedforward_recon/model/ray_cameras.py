"""Poses of the views that a `RayTransformer` describes: from matches, else from world points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.transforms import hat, inverse, so3_exp
from feedforward_recon.geometry.view_graph import ViewPair, placed_views
from feedforward_recon.model.cell_matching import matched
from feedforward_recon.model.ray_stem import CELL, cell_pixels
from feedforward_recon.model.ray_transformer import CellMaps, RayTransformer

ALL_PAIRS = 10  # with more views only pairs that look alike are compared
NEIGHBOURS = 6  # of each view then
COARSE_CELLS = 4  # cells that are one when views are compared as wholes
STEPS = 10  # of a pose from world points
WIDE = 0.03  # angle in radians from which their errors count less


def cameras_of(cells: CellMaps, K: torch.Tensor, network: RayTransformer, *, first: bool
               ) -> torch.Tensor:
    """Poses T_world_cam [B, N, 4, 4] of views with K [B, N, 3, 3].

    first: the first view is the world, and views are matched with each other. Without, all are
    queries of a scene that was written before, whose world their points are in.
    """
    poses = [_window(cells, index, K[index].double().cpu().numpy(), network, first)
             for index in range(len(K))]
    return torch.from_numpy(np.stack(poses)).to(K)


def _window(cells: CellMaps, index: int, K: np.ndarray, network: RayTransformer, first: bool
            ) -> np.ndarray:
    """Poses [N, 4, 4]; world points say those that matches leave open."""
    log_depth = cells.log_depth[index].cpu().numpy()
    placed = placed_views(_pairs(cells, index, K, log_depth, network) if first else [], len(K),
                          float(K[0, 0, 0]))
    if first and placed.placed.all():
        return placed.T_world_view
    points = cells.points[index].flatten(1, 2).cpu().numpy().astype(float)
    sure = cells.points_confidence[index].flatten(1).cpu().numpy().astype(float)
    said = np.stack([pose_from_points(points[view], _rays(K[view], log_depth[view].shape),
                                      np.exp(log_depth[view]).ravel(), sure[view])
                     for view in range(len(K))])
    if not first:
        return said
    return np.where(placed.placed[:, None, None], placed.T_world_view, inverse(said[0]) @ said)


def _pairs(cells: CellMaps, index: int, K: np.ndarray, log_depth: np.ndarray,
           network: RayTransformer) -> list[ViewPair]:
    """Matches of the views of one window that may show the same."""
    descriptors, fine = cells.descriptors[index], cells.fine[index]
    sharpness = float(network.log_sharpness.exp())
    found = []
    for i, j in similar_pairs(descriptors):
        same = matched(network.fine_matcher, descriptors, fine, (i, j), sharpness)
        pixels_i, pixels_j, deviation = (x.double().cpu().numpy() for x in (
            same.pixels_i, same.pixels_j, same.deviation))
        cell = (pixels_i - (CELL - 1) / 2) / CELL
        depth = np.exp(map_coordinates(log_depth[i], cell[:, ::-1].T, order=1, mode='nearest'))
        found.append(ViewPair(i, j, _normalised(pixels_i, K[i]), _normalised(pixels_j, K[j]),
                              deviation / K[j, 0, 0], depth))
    return found


def similar_pairs(descriptors: torch.Tensor) -> Sequence[tuple[int, int]]:
    """Pairs of views worth matching, of their descriptors [N, D, h, w].

    All of few views. Of many, each with those whose parts find the most similar parts there.
    """
    count = len(descriptors)
    if count <= ALL_PAIRS:
        return list(combinations(range(count), 2))
    parts = F.normalize(F.avg_pool2d(descriptors, COARSE_CELLS, ceil_mode=True).flatten(2), dim=1)
    alike = torch.stack([torch.einsum('dp,ndq->npq', view, parts).amax(2).mean(1)
                         for view in parts])
    alike = (alike + alike.T).fill_diagonal_(-1)
    nearest = alike.topk(NEIGHBOURS, 1).indices.tolist()
    return sorted({(min(i, j), max(i, j)) for i, row in enumerate(nearest) for j in row})


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


def pixel_maps(cells: CellMaps) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and its confidence [B, N, H, W] of all pixels, between the middles of cells."""
    depth, sure = (F.interpolate(x, scale_factor=CELL, mode='bilinear', align_corners=False)
                   for x in (cells.log_depth, cells.depth_confidence))
    return depth.exp(), sure


def _rays(K: np.ndarray, grid_hw: tuple[int, ...]) -> np.ndarray:
    pixels = cell_pixels((CELL * grid_hw[0], CELL * grid_hw[1])).double().numpy()
    return np.column_stack([_normalised(pixels, K), np.ones(len(pixels))])


def _normalised(pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    return (pixels - K[:2, 2]) / K[[0, 1], [0, 1]]
