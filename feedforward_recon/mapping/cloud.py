"""Coloured point cloud of a map: one averaged point per voxel, with a cap."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class CloudSource:
    """What a cloud is fused from, detached from the map that goes on growing.

    xyz: per part float32 [N, 3] in the frame that T_map_part [4, 4] brings into the map;
    rgb: per part uint8 [N, 3]; voxel: side of the cubes, map units.
    """

    xyz: tuple[np.ndarray, ...]
    rgb: tuple[np.ndarray, ...]
    T_map_part: tuple[np.ndarray, ...]
    voxel: float
    max_points: int

    def fused(self, metres_per_unit: float = 1.0) -> PointCloud:
        """One averaged point per voxel; in metres if a unit is that long."""
        if not self.xyz:
            return PointCloud()
        xyz = [transform_points(T, part)
               for T, part in zip(self.T_map_part, self.xyz, strict=True)]
        cloud = voxel_fused(np.concatenate(xyz), np.concatenate(self.rgb), self.voxel,
                            self.max_points)
        return PointCloud(cloud.xyz * np.float32(metres_per_unit), cloud.rgb)


def cloud_source(map_: GrowingMap, config: CloudConfig, newest_only: bool = False
                 ) -> CloudSource:
    """Sensor depth of the keyframes, or of the newest alone; or else its landmarks.

    A map without metric scale has a median depth of about one unit, as a room has about two
    metres: its voxels are half as large.
    """
    if any(len(k.cloud_cam) for k in map_.keyframes):
        chosen = slice(-1, None) if newest_only else slice(None)
        keyframes = map_.keyframes[chosen]
        return CloudSource(tuple(k.cloud_cam for k in keyframes),
                           tuple(k.cloud_rgb for k in keyframes),
                           tuple(map_.T_map_cam[chosen].copy()), config.voxel_m,
                           config.max_points)
    table = map_.landmarks
    firm = table.has_point & (table.views() >= 3)
    if newest_only and len(map_):
        firm &= table.mask(table.seen_by(len(map_) - 1))
    ids = np.flatnonzero(firm)
    return CloudSource((table.points_map(ids, map_.T_map_cam),), (table.rgb[ids],), (np.eye(4),),
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
