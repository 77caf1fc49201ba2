"""Camera pose from known points: robust PnP (OpenCV USAC) and robust Gauss-Newton refinement.

The refinement minimises reprojection errors and, where a sensor measured depth, inverse-depth
errors, whose noise is nearly constant for stereo and structured light (Nguyen et al. 2012).
Its information matrix gives the covariance of the pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    se3_exp,
    transform_points,
)

MIN_POINTS = 6
# No real camera knows its pose better than this, whatever the residuals of one frame say:
# systematic errors (calibration, map) do not shrink with the number of points.
FLOOR_STD = np.array([1e-3] * 3 + [5e-4] * 3)


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
                iterations: int = 10) -> PoseFit:
    """Polish a pose by Gauss-Newton with Cauchy weights (scale: ``outlier_px`` / 2).

    points_map: [M, 3]; pixels: [M, 2]; depth: sensor z-depth [M] in map units, 0 or NaN where
    unknown; depth_noise: standard deviation of inverse depth; sigma_px: expected error of the
    pixels, scalar or [M]. A point is an inlier when its error is below ``outlier_px`` sigmas.
    """
    target = camera.normalise(pixels)
    sigma = np.broadcast_to(np.asarray(sigma_px, float), len(target))
    rho = _inverse_depth(depth, len(target))
    T_cam_map = inverse(T_map_cam)
    scale = outlier_px / 2
    H, g, cost, norm = _normal_equations(T_cam_map, points_map, target, rho, camera.fx, sigma,
                                         depth_noise, scale)
    damping = 1e-6
    for _ in range(iterations):
        step = -np.linalg.solve(H + damping * np.diag(np.diag(H) + 1e-9), g)
        trial = se3_exp(step) @ T_cam_map
        new = _normal_equations(trial, points_map, target, rho, camera.fx, sigma, depth_noise,
                                scale)
        if new[2] <= cost:
            done = cost - new[2] < 1e-6 * cost
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


def pose_jacobian(points_cam: np.ndarray) -> np.ndarray:
    """D (T p) / d xi [M, 3, 6] at points T p = [M, 3], for T <- exp(xi) T: [I, -hat(Tp)]."""
    J = np.zeros((len(points_cam), 3, 6))
    x, y, z = points_cam.T
    J[:, 0, 0] = J[:, 1, 1] = J[:, 2, 2] = 1
    J[:, 0, 4], J[:, 0, 5] = z, -y
    J[:, 1, 3], J[:, 1, 5] = -z, x
    J[:, 2, 3], J[:, 2, 4] = y, -x
    return J


def _normal_equations(T_cam_map: np.ndarray, points: np.ndarray, target: np.ndarray,
                      rho: np.ndarray, focal_px: float, sigma: np.ndarray, depth_noise: float,
                      scale: float) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Weighted J^T J [6, 6], J^T r [6], robust cost, and errors in sigmas [M]."""
    p = transform_points(T_cam_map, points)
    front = p[:, 2] > 1e-6
    p = np.where(front[:, None], p, (0.0, 0.0, 1.0))
    inv_z = 1 / p[:, 2]
    xy = p[:, :2] * inv_z[:, None]
    gain = focal_px / sigma
    r = np.zeros((len(p), 3))
    r[:, :2] = (xy - target) * gain[:, None]
    has_depth = np.isfinite(rho)
    r[:, 2] = np.where(has_depth, (inv_z - np.nan_to_num(rho)) / depth_noise, 0)
    D = np.zeros((len(p), 3, 3))
    D[:, 0, 0] = D[:, 1, 1] = gain * inv_z
    D[:, 0, 2], D[:, 1, 2] = -gain * inv_z * xy[:, 0], -gain * inv_z * xy[:, 1]
    D[:, 2, 2] = np.where(has_depth, -inv_z**2 / depth_noise, 0)
    J = D @ pose_jacobian(p)
    norm2 = np.where(front, (r[:, :2]**2).sum(1), np.inf)
    # Cauchy, separately for image and depth: a wrong depth must not spoil a good pixel.
    squares = np.stack([norm2, r[:, 2]**2], 1) / scale**2
    weight = np.where(front[:, None], 1 / (1 + squares), 0)
    cost = 0.5 * scale**2 * float(np.log1p(np.minimum(squares, 1e6)).sum())
    rows = weight[:, [0, 0, 1]]
    Jw = (J * rows[..., None]).reshape(-1, 6)
    return Jw.T @ J.reshape(-1, 6), Jw.T @ r.ravel(), cost, np.sqrt(norm2)


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
