"""Coloured point cloud of a map: one averaged point per voxel, with a cap."""

from __future__ import annotations

import numpy as np

from feedforward_recon.types import PointCloud


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
