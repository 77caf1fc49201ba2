"""Coloured point cloud of a map: one averaged point per voxel, with a cap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from feedforward_recon.config.schema import CloudConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.types import PointCloud

FUSED_AT_ONCE = 200_000  # points; each takes about 200 bytes while it is fused, so 40 MB
Part = Callable[[], tuple[np.ndarray, np.ndarray]]  # makes points [N, 3] and colours [N, 3]


def sampled_depth(camera: Camera, image: np.ndarray, depth: np.ndarray | None, stride_px: int
                  ) -> tuple[np.ndarray, np.ndarray]:
    """Camera-frame points float32 [N, 3] and colours uint8 [N, 3] of every ``stride_px`` pixel."""
    if depth is None:
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
    half = stride_px // 2
    v, u = np.mgrid[half:depth.shape[0]:stride_px, half:depth.shape[1]:stride_px]
    seen = depth[v, u] > 0
    v, u = v[seen], u[seen]
    points = camera.unproject(np.stack([u, v], 1), depth[v, u])
    return points.astype(np.float32), image[v, u]


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
        cloud = voxel_fused(self._parts(), self.voxel, self.max_points)
        return PointCloud(cloud.xyz * np.float32(metres_per_unit), cloud.rgb)

    def _parts(self) -> list[Part]:
        """The parts in the map, made only when they are asked for, some at a time."""
        batches: list[list[int]] = [[]]
        count = 0
        for row, part in enumerate(self.xyz):
            if count and count + len(part) > FUSED_AT_ONCE:
                batches.append([])
                count = 0
            batches[-1].append(row)
            count += len(part)
        return [partial(self._part, rows) for rows in batches]

    def _part(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        xyz = [transform_points(self.T_map_part[row], self.xyz[row]) for row in rows]
        return np.concatenate(xyz), np.concatenate([self.rgb[row] for row in rows])


def cloud_source(map_: GrowingMap, config: CloudConfig, newest_only: bool = False
                 ) -> CloudSource:
    """Depth of the keyframes, or of the newest alone; or else its landmarks.

    A map without metric scale has a median depth of about one unit, as a room has about two
    metres: its voxels are half as large.
    """
    chosen = slice(-1, None) if newest_only else slice(None)
    if any(len(k.cloud_cam) for k in map_.keyframes[chosen]):
        keyframes = map_.keyframes[chosen]
        measured = any(np.isfinite(k.points_cam[:, 2]).any() for k in keyframes)
        return CloudSource(tuple(k.cloud_cam for k in keyframes),
                           tuple(k.cloud_rgb for k in keyframes),
                           tuple(map_.T_map_cam[chosen].copy()),
                           config.voxel_m if measured else config.voxel_m / 2, config.max_points)
    table = map_.landmarks
    firm = table.has_point & (table.views() >= 3)
    if newest_only and len(map_):
        firm &= table.mask(table.seen_by(len(map_) - 1))
    ids = np.flatnonzero(firm)
    return CloudSource((table.points_map(ids, map_.T_map_cam),), (table.rgb[ids],), (np.eye(4),),
                       config.voxel_m / 2, config.max_points)


def voxel_fused(parts: Sequence[Part], voxel: float, max_points: int) -> PointCloud:
    """Average the points and colours of all parts per cube of side ``voxel`` (map units).

    Parts are fused one after another, so that no more than one of them is in memory beside the
    result. Above ``max_points`` the voxels that most points fell into stay.
    """
    bounds = [(cells.min(0), cells.max(0)) for part in parts
              if len(cells := np.floor(_finite(*part())[0] / voxel))]
    if not bounds:
        return PointCloud()
    low = np.min([first for first, _ in bounds], 0)
    span = (np.max([last for _, last in bounds], 0) - low + 1).astype(np.int64)
    keys, sums = np.zeros(0, np.int64), np.zeros((0, 7))  # of x, y, z, r, g, b and of ones
    for part in parts:
        xyz, rgb = _finite(*part())
        x, y, z = (np.floor(xyz / voxel) - low).astype(np.int64).T
        keys = np.concatenate([keys, (x * span[1] + y) * span[2] + z])
        sums = np.concatenate([sums, np.column_stack([xyz, rgb, np.ones(len(xyz))])])
        keys, index = np.unique(keys, return_inverse=True)
        sums = np.stack([np.bincount(index, column, len(keys)) for column in sums.T], 1)
    if len(sums) > max_points:
        sums = sums[np.sort(np.argsort(-sums[:, 6], kind='stable')[:max_points])]
    fused = sums[:, :6] / sums[:, 6:]
    return PointCloud(fused[:, :3].astype(np.float32), np.rint(fused[:, 3:]).astype(np.uint8))


def _finite(xyz: np.ndarray, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    good = np.isfinite(xyz).all(1)
    return xyz[good], rgb[good]
