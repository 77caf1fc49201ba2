"""Relative pose of two calibrated views from matches: essential matrix, cheirality, parallax.

With little parallax several essential matrices (five-point solver, Nister 2004) have about as many
inliers. Those of several searches are refined, and the one with the lowest robust Sampson error is
taken. Of its four decompositions the one that puts most points in front of both cameras is taken,
and only if it wins clearly. A plane seen twice allows two poses (Longuet-Higgins 1986), so planar
scenes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.optimize import least_squares

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.pnp import usac_params
from feedforward_recon.geometry.transforms import hat, inverse, make_transform, so3_exp
from feedforward_recon.geometry.triangulate import ray_errors, triangulate

MIN_MATCHES = 15
CLEAR_WIN = 0.75
PLANAR_SHARE = 0.95
# Robust searches, by turns with the whole threshold and with half of it. With one of them 4 of 48
# monocular maps began wrong, by 30 to 70 degrees in the direction (docs/experiments.md, Hard
# walks).
SEARCHES = 6
ROBUST = 0.25  # Cauchy scale over the threshold: tracks are good to a quarter of a pixel
POLISH_STEPS = 20  # evaluations of a refinement; it converges in about five


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
                  threshold_px: float = 1.0, seed: int = 0, searches: int = SEARCHES) -> TwoView:
    """Relative pose from normalised coordinates [M, 2] of the same points in two views.

    searches: the best result of so many is taken; about 12 ms each.

    Raises DegenerateError when too few matches agree or the views have no usable parallax.
    """
    if len(xy_a) < MIN_MATCHES:
        raise DegenerateError(f'expected at least {MIN_MATCHES} matches, found {len(xy_a)}; '
                              'point the camera at texture')
    tolerance = threshold_px / focal_px
    R, t = _best_motion(xy_a, xy_b, focal_px, threshold_px, seed, searches)
    R_1, R_2, t = cv2.decomposeEssentialMat(hat(t) @ R)
    candidates = [_check(make_transform(R, s * t.ravel()), xy_a, xy_b, tolerance)
                  for R in (R_1, R_2) for s in (1, -1)]
    candidates.sort(key=lambda c: -int(c.inliers.sum()))
    best, second = (int(c.inliers.sum()) for c in candidates[:2])
    if best >= MIN_MATCHES:
        _refuse_plane(xy_a, xy_b, candidates[0], tolerance, seed)
    if best < MIN_MATCHES or second > CLEAR_WIN * best:
        raise DegenerateError(f'expected one relative pose that most of {len(xy_a)} matches '
                              f'agree on, found {best} and {second} for the best two; move '
                              'the camera sideways')
    return candidates[0]


def _refuse_plane(xy_a: np.ndarray, xy_b: np.ndarray, two: TwoView, tolerance: float,
                  seed: int) -> None:
    a, b = xy_a[two.inliers], xy_b[two.inliers]
    _, on_plane = cv2.findHomography(a, b, usac_params(2 * tolerance, seed))
    if on_plane is not None and on_plane.sum() > PLANAR_SHARE * len(a):
        raise DegenerateError(f'expected a scene with depth, found one plane ({on_plane.sum()} '
                              f'of {len(a)} matches); show the camera more than a wall')


def _best_motion(xy_a: np.ndarray, xy_b: np.ndarray, focal_px: float, threshold_px: float,
                 seed: int, searches: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and direction of T_b_a, up to the ambiguity of the essential matrix."""
    essentials = [essential_matrix(xy_a * focal_px, xy_b * focal_px, focal_px,
                                   threshold_px / (1 + search % 2), seed + search)
                  for search in range(searches)]
    found = [_polished(E, xy_a, xy_b, ROBUST * threshold_px / focal_px)
             for E in essentials if E is not None]
    if not found:
        raise DegenerateError('expected matches that determine a relative pose, found none '
                              'that agree; move the camera sideways')
    return min(found, key=lambda f: f[0])[1:]


def _polished(E: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray, scale: float
              ) -> tuple[float, np.ndarray, np.ndarray]:
    """Robust cost, rotation and direction of an essential matrix, refined on all matches."""
    a, b = (np.concatenate([xy, np.ones((len(xy), 1))], 1) for xy in (xy_a, xy_b))
    R_start, _, t_start = cv2.decomposeEssentialMat(E)
    across = np.linalg.svd(t_start.T)[2][1:]  # two directions at right angles to t

    def motion(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = t_start.ravel() + x[3:] @ across
        return so3_exp(x[:3]) @ R_start, t / np.linalg.norm(t)

    def sampson(x: np.ndarray) -> np.ndarray:
        R, t = motion(x)
        refined = hat(t) @ R
        line_b, line_a = a @ refined.T, b @ refined
        norm2 = (line_b[:, :2]**2).sum(1) + (line_a[:, :2]**2).sum(1)
        return (b * line_b).sum(1) / np.sqrt(norm2)

    result = least_squares(sampson, np.zeros(5), loss='cauchy', f_scale=scale,
                           max_nfev=POLISH_STEPS)
    return float(result.cost), *motion(result.x)


def essential_matrix(px_a: np.ndarray, px_b: np.ndarray, focal_px: float, threshold_px: float,
                     seed: int) -> np.ndarray | None:
    """The essential matrix [3, 3] that most matches agree with; None where the search fails.

    px_a, px_b: pixels [M, 2] relative to the principal point.
    """
    K = np.diag([focal_px, focal_px, 1.0])
    a, b = np.ascontiguousarray(px_a), np.ascontiguousarray(px_b)
    try:
        E, _ = cv2.findEssentialMat(a, b, K, K, None, None, usac_params(threshold_px, seed))
    except cv2.error:
        E = None  # OpenCV throws where its minimal solver met a degenerate sample
    usable = E is not None and E.shape == (3, 3) and np.all(np.isfinite(E))
    return E if usable else None


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
