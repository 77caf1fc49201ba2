"""Points from rays: linear multi-view triangulation, and the angle that makes it trustworthy."""

from __future__ import annotations

import numpy as np

from feedforward_recon.geometry.transforms import inverse


def triangulate(T_map_cam: np.ndarray, xy: np.ndarray, point_index: np.ndarray,
                count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points nearest to their rays, and the largest angle between rays of each.

    T_map_cam: pose of each ray [R, 4, 4]; xy: normalised coordinates [R, 2]; point_index: int
    [R] in 0..count-1. Minimises the sum of squared distances to the rays (the mid-point for
    two). Returns points [count, 3] in the map frame (NaN below two rays or for parallel rays)
    and angles [count] in degrees to the first ray of each point.
    """
    rays = np.concatenate([xy, np.ones((len(xy), 1))], 1)
    d = np.einsum('rij,rj->ri', T_map_cam[:, :3, :3], rays)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    across = np.eye(3) - d[:, :, None] * d[:, None]  # [R, 3, 3]
    A, b = np.zeros((count, 3, 3)), np.zeros((count, 3))
    np.add.at(A, point_index, across)
    np.add.at(b, point_index, np.einsum('rij,rj->ri', across, T_map_cam[:, :3, 3]))
    first = np.zeros((count, 3))
    first[point_index[::-1]] = d[::-1]
    cosine = np.ones(count)
    np.minimum.at(cosine, point_index, np.einsum('ri,ri->r', d, first[point_index]))
    angle_deg = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    points = np.full((count, 3), np.nan)
    good = angle_deg > 1e-3
    points[good] = np.linalg.solve(A[good], b[good][..., None])[..., 0]
    return points, angle_deg


def ray_errors(T_map_cam: np.ndarray, xy: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance [R] in normalised coordinates of points [R, 3] from rays; inf if behind."""
    T = inverse(T_map_cam)
    p = np.einsum('rij,rj->ri', T[:, :3, :3], points) + T[:, :3, 3]
    front = p[:, 2] > 1e-6
    z = np.where(front, p[:, 2], 1.0)
    error = np.linalg.norm(p[:, :2] / z[:, None] - xy, axis=1)
    return np.where(front, error, np.inf)
