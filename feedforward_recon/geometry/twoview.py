"""Relative pose of two calibrated views from matches: essential matrix, cheirality, parallax.

Of the four decompositions of the essential matrix (five-point solver, Nister 2004), the one
that puts most points in front of both cameras is taken, and only if it wins clearly. A plane
seen twice allows two poses (Longuet-Higgins 1986), so planar scenes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.pnp import usac_params
from feedforward_recon.geometry.transforms import inverse, make_transform
from feedforward_recon.geometry.triangulate import ray_errors, triangulate

MIN_MATCHES = 15
CLEAR_WIN = 0.75
PLANAR_SHARE = 0.95


@dataclass(frozen=True)
class TwoView:
    """T_a_b: pose of view b in view a, translation of length 1; points [M, 3] in frame a.

    inliers: bool [M]; angle_deg: ray angle [M].
    """

    T_a_b: np.ndarray
    points: np.ndarray
    inliers: np.ndarray
    angle_deg: np.ndarray


def relative_pose(xy_a: np.ndarray, xy_b: np.ndarray, focal_px: float,
                  threshold_px: float = 1.0, seed: int = 0) -> TwoView:
    """Relative pose from normalised coordinates [M, 2] of the same points in two views.

    Raises DegenerateError when too few matches agree or the views have no usable parallax.
    """
    if len(xy_a) < MIN_MATCHES:
        raise DegenerateError(f'expected at least {MIN_MATCHES} matches, found {len(xy_a)}; '
                              'point the camera at texture')
    E = _essential(xy_a, xy_b, focal_px, threshold_px, seed)
    R_1, R_2, t = cv2.decomposeEssentialMat(E)
    candidates = [_check(make_transform(R, s * t.ravel()), xy_a, xy_b, threshold_px / focal_px)
                  for R in (R_1, R_2) for s in (1, -1)]
    candidates.sort(key=lambda c: -int(c.inliers.sum()))
    best, second = (int(c.inliers.sum()) for c in candidates[:2])
    if best < MIN_MATCHES or second > CLEAR_WIN * best:
        raise DegenerateError(f'expected one relative pose that most of {len(xy_a)} matches '
                              f'agree on, found {best} and {second} for the best two; move '
                              'the camera sideways')
    _refuse_plane(xy_a, xy_b, candidates[0], threshold_px / focal_px, seed)
    return candidates[0]


def _refuse_plane(xy_a: np.ndarray, xy_b: np.ndarray, two: TwoView, tolerance: float,
                  seed: int) -> None:
    a, b = xy_a[two.inliers], xy_b[two.inliers]
    _, on_plane = cv2.findHomography(a, b, usac_params(2 * tolerance, seed))
    if on_plane is not None and on_plane.sum() > PLANAR_SHARE * len(a):
        raise DegenerateError(f'expected a scene with depth, found one plane ({on_plane.sum()} '
                              f'of {len(a)} matches); show the camera more than a wall')


def _essential(xy_a: np.ndarray, xy_b: np.ndarray, focal_px: float, threshold_px: float,
               seed: int) -> np.ndarray:
    K = np.diag([focal_px, focal_px, 1.0])
    a, b = (np.ascontiguousarray(xy * focal_px) for xy in (xy_a, xy_b))
    try:
        E, _ = cv2.findEssentialMat(a, b, K, K, None, None, usac_params(threshold_px, seed))
    except cv2.error:
        E = None  # OpenCV throws where its minimal solver met a degenerate sample
    if E is None or E.shape != (3, 3) or not np.all(np.isfinite(E)):
        raise DegenerateError('expected matches that determine a relative pose, found none '
                              'that agree; move the camera sideways')
    return E


def _check(T_b_a: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray,
           tolerance: float) -> TwoView:
    count = len(xy_a)
    T_a_b = inverse(T_b_a)
    poses = np.concatenate([np.broadcast_to(np.eye(4), (count, 4, 4)),
                            np.broadcast_to(T_a_b, (count, 4, 4))])
    xy = np.concatenate([xy_a, xy_b])
    index = np.tile(np.arange(count), 2)
    points, angle_deg = triangulate(poses, xy, index, count)
    seen = np.isfinite(points[:, 0])
    safe = np.where(seen[:, None], points, (0.0, 0.0, -1.0))
    error = ray_errors(poses, xy, np.concatenate([safe, safe])).reshape(2, count)
    return TwoView(T_a_b, points, seen & (error.max(0) < 2 * tolerance), angle_deg)
