"""Camera pose from known points: robust PnP (OpenCV USAC) and robust Gauss-Newton refinement.

The refinement minimises reprojection errors and, where a sensor measured depth, inverse-depth
errors, whose noise is nearly constant for stereo and structured light (Nguyen et al. 2012).
Its information matrix gives the covariance of the pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.geometry.bearings import Bearings, across
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    se3_exp,
)

MIN_POINTS = 6
# No real camera knows its pose better than this, whatever the residuals of one frame say:
# systematic errors (calibration, map) do not shrink with the number of points.
FLOOR_STD = np.array([1e-3] * 3 + [5e-4] * 3)
# Relative decrease of the cost below which a pose is found: what is left to gain is a twentieth of
# the standard deviation of a pose from 300 points.
CONVERGED = 1e-5


@dataclass(frozen=True)
class PoseFit:
    """A camera pose from points.

    covariance: [6, 6] of (x y z rx ry rz), left perturbation in the map frame.
    inliers: bool [M].
    """

    T_map_cam: np.ndarray
    covariance: np.ndarray
    inliers: np.ndarray

    @property
    def count(self) -> int:
        """Number of inliers."""
        return int(self.inliers.sum())


def usac_params(threshold: float, seed: int, iterations: int = 1000) -> cv2.UsacParams:
    """Seeded MAGSAC-like settings of OpenCV's robust estimators, threshold in image units."""
    params = cv2.UsacParams()
    params.threshold = threshold
    params.maxIterations = iterations
    params.confidence = 0.999
    params.randomGeneratorState = seed
    params.isParallel = False
    params.score = cv2.SCORE_METHOD_MSAC
    params.sampler = cv2.SAMPLING_UNIFORM
    params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
    return params


def pnp_ransac(points_map: np.ndarray, pixels: np.ndarray, camera: Camera,
               threshold_px: float = 4.0, seed: int = 0,
               iterations: int = 1000) -> PoseFit | None:
    """Pose of a camera that sees map points [M, 3] at pixels [M, 2]; wrong matches allowed.

    Returns None when fewer than ``MIN_POINTS`` matches agree on any pose.
    """
    if len(points_map) < MIN_POINTS:
        return None
    focal_px = camera.fx
    # Undistorted image at one focal length: the threshold stays in pixels.
    flat = np.ascontiguousarray(camera.normalise(pixels) * focal_px)
    K = np.diag([focal_px, focal_px, 1.0])
    try:
        found, _, rvec, tvec, _ = cv2.solvePnPRansac(
            np.ascontiguousarray(points_map, np.float64), flat, K, None,
            params=usac_params(threshold_px, seed, iterations))
    except cv2.error:
        return None  # OpenCV throws where its minimal solver met a degenerate sample
    if not found or not np.all(np.isfinite(rvec)) or not np.all(np.isfinite(tvec)):
        return None
    T_map_cam = inverse(make_transform(cv2.Rodrigues(rvec)[0], tvec.ravel()))
    fit = refine_pose(T_map_cam, points_map, pixels, camera, outlier_px=threshold_px)
    return fit if fit.count >= MIN_POINTS else None


def refine_pose(T_map_cam: np.ndarray, points_map: np.ndarray, pixels: np.ndarray,
                camera: Camera, *, depth: np.ndarray | None = None, depth_noise: float = 0.004,
                sigma_px: float | np.ndarray = 1.0, outlier_px: float = 4.0,
                iterations: int = 10, bearings: Bearings | None = None) -> PoseFit:
    """Polish a pose by Gauss-Newton with Cauchy weights (scale: ``outlier_px`` / 2).

    points_map: [M, 3]; pixels: [M, 2]; depth: sensor z-depth [M] in map units, 0 or NaN where
    unknown; depth_noise: standard deviation of inverse depth; sigma_px: expected error of the
    pixels, scalar or [M]. A point is an inlier when its error is below ``outlier_px`` sigmas.
    bearings: what is seen at unknown depth, with an error of a pixel.
    """
    seen = _Seen(points_map.T, camera.normalise(pixels).T, _inverse_depth(depth, len(points_map)),
                 camera.fx / np.broadcast_to(np.asarray(sigma_px, float), len(points_map)),
                 depth_noise, outlier_px / 2, bearings, camera.fx)
    T_cam_map = inverse(T_map_cam)
    H, g, cost, norm = _normal_equations(seen, T_cam_map)
    damping = 1e-6
    for _ in range(iterations):
        step = -np.linalg.solve(H + damping * np.diag(np.diag(H) + 1e-9), g)
        trial = se3_exp(step) @ T_cam_map
        new = _normal_equations(seen, trial)
        if new[2] <= cost:
            done = cost - new[2] < CONVERGED * cost
            T_cam_map, (H, g, cost, norm), damping = trial, new, damping * 0.1
            if done:
                break
        else:
            damping = max(damping, 1e-6) * 100
    inliers = norm < outlier_px
    return PoseFit(inverse(T_cam_map), _covariance(H, T_cam_map, norm, inliers), inliers)


def _inverse_depth(depth: np.ndarray | None, count: int) -> np.ndarray:
    if depth is None:
        return np.full(count, np.nan)
    safe = np.where(np.nan_to_num(depth) > 0, depth, np.nan)
    return 1 / safe


@dataclass(frozen=True)
class _Seen:
    """What a pose is fitted to; M points, components first (see ``bundle_rows``).

    points: map frame [3, M]; target: normalised coordinates [2, M]; inv_depth: [M], NaN if none.
    gain: [M], image errors to sigmas; depth_noise: of ``inv_depth``; scale: of the Cauchy weights.
    bearings: at unknown depth, seen with an error of 1 / focal_px.
    """

    points: np.ndarray
    target: np.ndarray
    inv_depth: np.ndarray
    gain: np.ndarray
    depth_noise: float
    scale: float
    bearings: Bearings | None
    focal_px: float


def _normal_equations(seen: _Seen, T_cam_map: np.ndarray
                      ) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Weighted J^T J [6, 6], J^T r [6], robust cost, and image errors in sigmas [M]."""
    p = T_cam_map[:3, :3] @ seen.points + T_cam_map[:3, 3:]
    front = p[2] > 1e-6
    p = np.where(front, p, [[0.0], [0.0], [1.0]])
    inv_z = 1 / p[2]
    r = np.empty((3, len(inv_z)))
    r[:2] = (p[:2] * inv_z - seen.target) * seen.gain
    has_depth = np.isfinite(seen.inv_depth)
    r[2] = np.where(has_depth, (inv_z - seen.inv_depth) / seen.depth_noise, 0)
    norm2 = np.where(front, r[0]**2 + r[1]**2, np.inf)
    # Cauchy, separately for image and depth: a wrong depth must not spoil a good pixel.
    squares = np.stack([norm2, r[2]**2]) / seen.scale**2
    weight = np.where(front, 1 / (1 + squares), 0)[[0, 0, 1]]
    cost = 0.5 * seen.scale**2 * float(np.log1p(np.minimum(squares, 1e6)).sum())
    J = pose_jacobian(p, seen.gain * inv_z, np.where(has_depth, inv_z**2 / seen.depth_noise, 0))
    Jw = (J * weight).reshape(6, -1)
    H, g = Jw @ J.reshape(6, -1).T, Jw @ r.ravel()
    if seen.bearings is not None:
        more = _bearing_equations(seen.bearings, T_cam_map, seen.focal_px, seen.scale)
        H, g, cost = H + more[0], g + more[1], cost + more[2]
    return H, g, cost, np.sqrt(norm2)


def _bearing_equations(bearings: Bearings, T_cam_map: np.ndarray, focal_px: float, scale: float
                   ) -> tuple[np.ndarray, np.ndarray, float]:
    """Weighted J^T J [6, 6], J^T r [6] and robust cost of bearings."""
    p, slide, front = bearings.seen_from(T_cam_map)
    slide = focal_px * slide
    r = across(focal_px * (p[:2] / p[2] - bearings.target), slide)
    J = across(pose_jacobian(p, focal_px / p[2], np.zeros(len(front)))[:, :2], slide)
    squares = np.where(front, (r**2).sum(0), np.inf) / scale**2
    cost = 0.5 * scale**2 * float(np.log1p(np.minimum(squares, 1e6)).sum())
    Jw = (J / (1 + squares)).reshape(6, -1)
    return Jw @ J.reshape(6, -1).T, Jw @ r.ravel(), cost


def pose_jacobian(p: np.ndarray, by_xy: np.ndarray, by_inv_z: np.ndarray) -> np.ndarray:
    """Derivatives [6, 3, M] of (u, v, d) by xi, for T <- exp(xi) T, at points T p = [3, M].

    by_xy: [M], du / dx of the camera-frame x; by_inv_z: [M], -dd / dz. D [I, -hat(Tp)] with
    D = by_xy [1 0 -x/z; 0 1 -y/z] and (0 0 -by_inv_z).
    """
    (x, y, z), J = p, np.zeros((6, 3, p.shape[1]))
    u, v = x / z, y / z
    J[0, 0] = J[1, 1] = by_xy
    J[2, 0], J[2, 1], J[2, 2] = -by_xy * u, -by_xy * v, -by_inv_z
    J[3, 0], J[3, 1], J[3, 2] = J[2, 0] * y, J[2, 1] * y - by_xy * z, J[2, 2] * y
    J[4, 0], J[4, 1], J[4, 2] = by_xy * z - J[2, 0] * x, -J[2, 1] * x, -J[2, 2] * x
    J[5, 0], J[5, 1] = -by_xy * y, by_xy * x
    return J


def _covariance(H: np.ndarray, T_cam_map: np.ndarray, norm: np.ndarray,
                inliers: np.ndarray) -> np.ndarray:
    """Covariance of (position, rotation vector) in the map frame, positive definite."""
    variance = max(float(np.mean(norm[inliers]**2)) / 2, 0.05) if inliers.any() else 1e4
    cov_cam = variance * np.linalg.inv(H + 1e-6 * np.eye(6))
    # T_map_cam = T_cam_map^-1 exp(-xi): both parts are rotated into the map frame.
    A = np.zeros((6, 6))
    A[:3, :3] = A[3:, 3:] = T_cam_map[:3, :3].T
    cov = A @ cov_cam @ A.T
    return 0.5 * (cov + cov.T) + np.diag(FLOOR_STD**2)
