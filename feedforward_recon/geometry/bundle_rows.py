"""What bundle adjustment minimises: residuals of observations, and their robust weights.

Residual of observation o of point X by keyframe k, with p = T_cam_map X, in standard deviations:

    r = [ f (s (1 + k q) p_x / p_z - x_o) / sigma,    q = (p_x^2 + p_y^2) / p_z^2
          f (s (1 + k q) p_y / p_z - y_o) / sigma,
          (1 / p_z - d_o + e) / sigma_d ]

The calibration: ``s`` scales the focal length, ``k`` is radial distortion beyond what is known
(the k1 of Brown 1971), ``e`` shifts the inverse depths of a stereo pair, as a small turn of one
camera about its vertical axis does.

Arrays have their components first and the O observations last: each operation then runs along
contiguous memory, several times as fast as products of many small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

MIN_DEPTH = 1e-6
BEHIND = 1e8  # squared image error of a point behind its camera: large, but its cost is finite


@dataclass(frozen=True)
class BundleProblem:
    """What is known and what is seen.

    T_map_cam: [P, 4, 4]; points: map frame [L, 3]; fixed: bool [P], poses that stay.
    pose_index, point_index: int [O], each pair at most once.
    xy: [O, 2] undistorted normalised coordinates; inv_depth: [O] sensor 1/z, NaN if none.
    sigma_px: [O] expected pixel error; depth_noise: standard deviation of ``inv_depth``, one for
    all or [O].
    focal_px: converts normalised coordinates to pixels. calibration: what of it is refined, of the
    names of ``geometry.refine.PRIOR_STD``. shifted: bool [O], inverse depths that share the shift.
    """

    T_map_cam: np.ndarray
    points: np.ndarray
    fixed: np.ndarray
    pose_index: np.ndarray
    point_index: np.ndarray
    xy: np.ndarray
    inv_depth: np.ndarray
    sigma_px: np.ndarray
    focal_px: float
    depth_noise: float | np.ndarray = 0.004
    robust_px: float = 1.5
    calibration: tuple[str, ...] = ()
    shifted: np.ndarray | bool = False


@dataclass(frozen=True)
class BundleState:
    """What is refined: poses T_cam_map [P, 4, 4], points [L, 3] and the calibration."""

    T_cam_map: np.ndarray
    points: np.ndarray
    focal_scale: float = 1.0
    radial: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Residuals r [3, O] of a state, and what their derivatives are made of.

    front: bool [O], points in front of the camera. R [3, 3, O], p [3, O]: rotation T_cam_map and
    the point in the camera frame. xy [2, O]: its direction before the lens. gain [O]: pixel
    errors to sigmas. has_depth: bool [O].
    """

    r: np.ndarray
    front: np.ndarray
    R: np.ndarray
    p: np.ndarray
    xy: np.ndarray
    gain: np.ndarray
    has_depth: np.ndarray


def piece_of(problem: BundleProblem, rows: Rows, part: slice) -> tuple[BundleProblem, Rows]:
    """Some of the observations of a problem, with all of its poses and points, and their rows."""
    noise, shifted = problem.depth_noise, problem.shifted
    cut = replace(problem, pose_index=problem.pose_index[part], xy=problem.xy[part],
                  point_index=problem.point_index[part], inv_depth=problem.inv_depth[part],
                  sigma_px=problem.sigma_px[part],
                  depth_noise=noise[part] if isinstance(noise, np.ndarray) else noise,
                  shifted=shifted[part] if isinstance(shifted, np.ndarray) else shifted)
    return cut, Rows(*(getattr(rows, name)[..., part] for name in rows.__dataclass_fields__))


def residuals(problem: BundleProblem, state: BundleState) -> Rows:
    """Residuals of a state; a point behind its camera counts as one in front of it, far off."""
    R = np.take(np.moveaxis(state.T_cam_map[:, :3, :3], 0, -1), problem.pose_index, 2)
    p = (np.einsum('ijo,jo->io', R, np.take(state.points.T, problem.point_index, 1))
         + np.take(state.T_cam_map[:, :3, 3].T, problem.pose_index, 1))
    front = p[2] > MIN_DEPTH
    if not front.all():
        p[:, ~front] = np.array((0.0, 0.0, 1.0))[:, None]
    inv_z = 1 / p[2]
    xy = p[:2] * inv_z
    gain = problem.focal_px / problem.sigma_px
    stretch = state.focal_scale * (1 + state.radial * (xy**2).sum(0))
    has_depth = np.isfinite(problem.inv_depth)
    r = np.empty((3, len(inv_z)))
    r[:2] = gain * (stretch * xy - problem.xy.T)
    r[2] = np.where(has_depth, inv_z - problem.inv_depth + state.shift * problem.shifted, 0)
    r[2] /= problem.depth_noise
    return Rows(r, front, R, p, xy, gain, has_depth)


def derivatives(problem: BundleProblem, state: BundleState, rows: Rows
                ) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of r by p, D [3, 3, O], and by the calibration [m, 3, O].

    Poses are perturbed as T_cam_map <- exp(xi) T_cam_map, so by the pose they are
    D [I, -hat(p)], and by the point D R.
    """
    x, y, inv_z, gain = *rows.xy, 1 / rows.p[2], rows.gain
    q = x * x + y * y
    stretch = state.focal_scale * (1 + state.radial * q)
    D = np.zeros((3, 3, len(x)))
    D[0, 0] = D[1, 1] = gain * stretch * inv_z
    if state.radial:
        bend = 2 * state.focal_scale * state.radial * gain * inv_z
        D[:2, :2] += bend * rows.xy[:, None] * rows.xy
    D[:2, 2] = -np.einsum('ijo,jo->io', D[:2, :2], rows.xy)
    D[2, 2] = np.where(rows.has_depth, -inv_z**2 / problem.depth_noise, 0)
    by_calibration = np.zeros((len(problem.calibration), 3, len(x)))
    stretched = {'focal': 1 + state.radial * q, 'radial': state.focal_scale * q}
    for out, name in zip(by_calibration, problem.calibration, strict=True):
        if name == 'shift':
            out[2] = (rows.has_depth & problem.shifted) / problem.depth_noise
        else:
            out[:2] = gain * stretched[name] * rows.xy
    return D, by_calibration


def robust_cost(problem: BundleProblem, rows: Rows) -> tuple[float, np.ndarray, np.ndarray]:
    """Cauchy cost, weights [3, O] of the residuals, and image errors [O] in sigmas."""
    scale2 = problem.robust_px**2
    norm2 = np.where(rows.front, rows.r[0]**2 + rows.r[1]**2, BEHIND)
    squares = np.stack([norm2, np.where(rows.front, rows.r[2]**2, 0)]) / scale2
    cost = 0.5 * scale2 * float(np.log1p(squares).sum())
    weight = np.where(rows.front, 1 / (1 + squares), 0)
    return cost, weight[[0, 0, 1]], np.where(rows.front, np.sqrt(norm2), np.inf)
