"""Coloured point cloud of a map: one averaged point per voxel, with a cap."""

from __future__ import annotations

import numpy as np

from feedforward_recon.config import CloudConfig
from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.mapping.growing_map import GrowingMap
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.types import PointCloud


def sampled_depth(view: View, stride_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Camera-frame points float32 [N, 3] and colours uint8 [N, 3] of every few pixels."""
    if view.depth is None:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
    half = stride_px // 2
    v, u = np.mgrid[half:view.depth.shape[0]:stride_px, half:view.depth.shape[1]:stride_px]
    seen = view.depth[v, u] > 0
    v, u = v[seen], u[seen]
    points = view.camera.unproject(np.stack([u, v], 1), view.depth[v, u])
    return points.astype(np.float32), view.image[v, u]


def map_cloud(map_: GrowingMap, config: CloudConfig) -> PointCloud:
    """The cloud of a map: sensor depth of its keyframes, or else its landmarks.

    A map without metric scale has a median depth of about one unit, as a room has about two
    metres: its voxels are half as large.
    """
    if any(len(k.cloud_cam) for k in map_.keyframes):
        xyz = [transform_points(T, k.cloud_cam)
               for k, T in zip(map_.keyframes, map_.T_map_cam, strict=True)]
        rgb = [k.cloud_rgb for k in map_.keyframes]
        return voxel_fused(np.concatenate(xyz), np.concatenate(rgb), config.voxel_m,
                           config.max_points)
    table = map_.landmarks
    ids = np.flatnonzero(table.has_point & (table.views() >= 3))
    return voxel_fused(table.points_map(ids, map_.T_map_cam), table.rgb[ids],
                       config.voxel_m / 2, config.max_points)


def voxel_fused(xyz: np.ndarray, rgb: np.ndarray, voxel: float, max_points: int) -> PointCloud:
    """Average points [N, 3] and colours [N, 3] per cube of side ``voxel`` (map units).

    Above ``max_points`` the voxels that most points fell into stay.
    """
    finite = np.isfinite(xyz).all(1)
    xyz, rgb = xyz[finite], rgb[finite]
    if not len(xyz):
        return PointCloud()
    cells = np.floor(xyz / voxel).astype(np.int64)
    cells -= cells.min(0)
    span = cells.max(0) + 1
    key = (cells[:, 0] * span[1] + cells[:, 1]) * span[2] + cells[:, 2]
    _, index, counts = np.unique(key, return_inverse=True, return_counts=True)
    fused = [np.stack([np.bincount(index, column) for column in np.asarray(values, float).T], 1)
             / counts[:, None] for values in (xyz, rgb)]
    if len(counts) > max_points:
        keep = np.sort(np.argsort(-counts, kind='stable')[:max_points])
        fused = [values[keep] for values in fused]
    return PointCloud(fused[0].astype(np.float32), np.rint(fused[1]).astype(np.uint8))
