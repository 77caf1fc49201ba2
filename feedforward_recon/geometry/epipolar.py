"""The motion between two calibrated views, fast enough for thousands of pairs.

One robust search for the essential matrix (five-point solver, Nister 2004), or a turn alone where
the views have no parallax. A motion is good to a degree or so where parallax is small: what counts
is that wrong pairs are refused, since many pairs correct each other afterwards. For the one pair
that a monocular map starts from there is ``twoview``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.geometry.bundle_rows import MIN_DEPTH
from feedforward_recon.geometry.transforms import inverse, make_transform
from feedforward_recon.geometry.twoview import essential_matrix

STEPS, CONVERGED = 10, 1e-6  # of iterations that re-weight; the change of a unit vector
# A turn explains a pair if it has this share of the matches that a motion has: with parallax, near
# things disagree with it.
TURN_SHARE = 0.9


@dataclass(frozen=True)
class PairMotion:
    """T_a_b: pose of view b in view a, its translation of length 1, or 0 for a turn on the spot.

    inliers: bool [M]; points: [M, 3] in frame a, NaN for a turn; angle: [M] between the rays of a
    point, radians.
    """

    T_a_b: np.ndarray
    inliers: np.ndarray
    points: np.ndarray
    angle: np.ndarray


def motion_between(xy_a: np.ndarray, xy_b: np.ndarray, tolerance: float, seed: int
                   ) -> PairMotion | None:
    """The motion that most matches agree with, from normalised coordinates [M, 2].

    tolerance: largest distance of an inlier, in normalised coordinates. None where neither an
    essential matrix nor a turn that half of them agree with is found.
    """
    turn = _turn(xy_a, xy_b, tolerance)
    # In units of the tolerance: OpenCV's solvers expect pixels.
    E = essential_matrix(xy_a / tolerance, xy_b / tolerance, 1 / tolerance, 1.0, seed)
    if E is None:
        return turn if 2 * turn.inliers.sum() > len(xy_a) else None
    R_1, R_2, t = cv2.decomposeEssentialMat(E)
    moved = max((checked(inverse(make_transform(R, sign * t.ravel())), xy_a, xy_b, tolerance)
                 for R in (R_1, R_2) for sign in (1, -1)), key=lambda m: int(m.inliers.sum()))
    return turn if turn.inliers.sum() > TURN_SHARE * moved.inliers.sum() else moved


def moved_along(R_a_b: np.ndarray, direction: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray,
                tolerance: float) -> PairMotion:
    """The motion with a known rotation [3, 3], and the direction [3] that agrees best with it.

    direction: to start from. Epipolar errors are linear in it: robust least squares. Inliers are
    within twice the tolerance: the rotation is not of this pair alone.
    """
    rays_a, rays_b = _rays(xy_a), _rays(xy_b) @ R_a_b.T
    normal = np.cross(rays_a, rays_b)
    t = direction / np.linalg.norm(direction)
    for step in range(STEPS):
        line = np.cross(t, rays_b)[:, :2]
        size = np.maximum(np.linalg.norm(line, axis=1), MIN_DEPTH)
        error = normal @ t / (size * tolerance)
        # At first all count: the direction to start from may be far off.
        weight = 1 / ((1 + 4 * error**2) * size**2) if step else np.ones(len(size))
        before, t = t, np.linalg.eigh((normal * weight[:, None]).T @ normal)[1][:, 0]
        t = t if t @ before > 0 else -t
        if np.linalg.norm(t - before) < CONVERGED:
            break
    # The sign is what the points in front of both cameras say.
    return max((checked(make_transform(R_a_b, sign * t), xy_a, xy_b, 2 * tolerance)
                for sign in (1, -1)), key=lambda m: int(m.inliers.sum()))


def checked(T_a_b: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray, tolerance: float) -> PairMotion:
    """A motion with its points, half way between their rays, and the matches that agree."""
    R, t = T_a_b[:3, :3], T_a_b[:3, 3]
    rays_a, rays_b = _rays(xy_a), _rays(xy_b) @ R.T
    if not t.any():
        front = rays_b[:, 2] > MIN_DEPTH
        inliers = front & (_distance(rays_b, xy_a, front) < tolerance)
        return PairMotion(T_a_b, inliers, np.full((len(xy_a), 3), np.nan), np.zeros(len(xy_a)))
    aa, bb, ab = ((x * y).sum(1) for x, y in ((rays_a, rays_a), (rays_b, rays_b),
                                              (rays_a, rays_b)))
    at, bt = rays_a @ t, rays_b @ t
    across = np.maximum(aa * bb - ab**2, 1e-12)
    depth_a, depth_b = (at * bb - bt * ab) / across, (at * ab - bt * aa) / across
    points = 0.5 * (rays_a * depth_a[:, None] + t + rays_b * depth_b[:, None])
    in_b = (points - t) @ R
    front = np.minimum(points[:, 2], in_b[:, 2]) > MIN_DEPTH
    error = np.maximum(_distance(points, xy_a, front), _distance(in_b, xy_b, front))
    angle = np.arccos(np.clip(ab / np.sqrt(aa * bb), -1, 1))
    return PairMotion(T_a_b, front & (error < tolerance), points, angle)


def _turn(xy_a: np.ndarray, xy_b: np.ndarray, tolerance: float) -> PairMotion:
    """The turn on the spot that most matches agree with."""
    rays_a, rays_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in
                      (_rays(xy_a), _rays(xy_b)))
    weight = np.ones(len(rays_a))
    for _ in range(STEPS):
        U, _, Vt = np.linalg.svd((weight[:, None] * rays_a).T @ rays_b)
        R = U @ np.diag([1, 1, np.sign(np.linalg.det(U @ Vt))]) @ Vt  # Kabsch 1976
        weight = 1 / (1 + (np.linalg.norm(rays_b @ R.T - rays_a, axis=1) / tolerance)**2)
    return checked(make_transform(R, np.zeros(3)), xy_a, xy_b, tolerance)


def _rays(xy: np.ndarray) -> np.ndarray:
    return np.column_stack([xy, np.ones(len(xy))])


def _distance(points: np.ndarray, xy: np.ndarray, front: np.ndarray) -> np.ndarray:
    """How far points [M, 3] show from xy [M, 2]; large numbers for those not in front."""
    z = np.where(front, points[:, 2], MIN_DEPTH)[:, None]
    return np.linalg.norm(points[:, :2] / z - xy, axis=1)
