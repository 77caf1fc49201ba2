"""Camera pose from map points and pixels: robust search, then weighted refinement.

Both work on normalised coordinates (x / z, y / z) and undistorted rays, so that any camera
model can be used. The search is OpenCV's USAC with P3P, MSAC scoring and local optimisation,
seeded; the refinement is Gauss-Newton on the reprojection error with Cauchy weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from feedforward_recon.geometry.transforms import hat, make_transform, se3_exp, transform_points

# USAC works in pixels of a virtual camera; only the ratio of threshold to focal matters.
VIRTUAL_FOCAL_PX = 500.0
MIN_POINTS = 6
MIN_DEPTH = 1e-3


@dataclass(frozen=True)
class Resection:
    """A refined pose: T_cam_map [4, 4], weights [N] in 0..1 and information [6, 6].

    The information belongs to a left perturbation of T_cam_map, (rho, omega), in units of
    the sigmas given to ``refine_pose``.
    """

    T_cam_map: np.ndarray
    weights: np.ndarray
    information: np.ndarray


def find_pose(points: np.ndarray, rays: np.ndarray, threshold: float, *, iterations: int,
              seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Pose that most correspondences agree with: (T_cam_map [4, 4], inlier indices).

    points: [N, 3] in the map; rays: [N, 2] normalised; threshold: reprojection error in
    normalised units. None when no pose has at least six inliers.
    """
    if len(points) < MIN_POINTS:
        return None
    params = cv2.UsacParams()
    params.confidence, params.maxIterations = 0.9999, iterations
    params.threshold = threshold * VIRTUAL_FOCAL_PX
    params.randomGeneratorState, params.isParallel = seed, False
    params.sampler, params.score = cv2.SAMPLING_UNIFORM, cv2.SCORE_METHOD_MSAC
    params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
    params.loIterations, params.loSampleSize = 5, 20
    K = np.diag([VIRTUAL_FOCAL_PX, VIRTUAL_FOCAL_PX, 1.0])
    try:
        found, _, rvec, tvec, inliers = cv2.solvePnPRansac(
            np.ascontiguousarray(points, float), rays * VIRTUAL_FOCAL_PX, K, None, params=params)
    except cv2.error:
        # OpenCV raises instead of answering "not found" for some degenerate samples.
        return None
    if not found or inliers is None or len(inliers) < MIN_POINTS:
        return None
    return make_transform(cv2.Rodrigues(rvec)[0], tvec[:, 0]), inliers[:, 0]


def refine_pose(points: np.ndarray, rays: np.ndarray, sigma: np.ndarray, T_cam_map: np.ndarray,
                *, iterations: int = 10) -> Resection:
    """Minimise sum log(1 + |r / (2 sigma)|^2) over the pose, from a start T_cam_map.

    points: [N, 3] in the map; rays: [N, 2] and sigma: [N] in normalised units.
    Jacobian of the projection: Sola et al. (2018), eq. 191, for a left perturbation.
    """
    T = np.asarray(T_cam_map, float)
    for _ in range(iterations):
        residual, J, weights = _linearised(points, rays, sigma, T)
        information = np.einsum('nia,n,nib->ab', J, weights, J, optimize=True)
        gradient = np.einsum('nia,n,ni->a', J, weights, residual, optimize=True)
        damping = 1e-9 * np.trace(information) + 1e-12
        step = -np.linalg.solve(information + damping * np.eye(6), gradient)
        T = se3_exp(step) @ T
        if np.abs(step).max() < 1e-7:
            break
    _, J, weights = _linearised(points, rays, sigma, T)
    return Resection(T, weights, np.einsum('nia,n,nib->ab', J, weights, J, optimize=True))


def _linearised(points: np.ndarray, rays: np.ndarray, sigma: np.ndarray,
                T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals [N, 2] and Jacobians [N, 2, 6] in sigmas, and Cauchy weights [N]."""
    in_cam = transform_points(T, points)
    front = in_cam[:, 2] > MIN_DEPTH
    inv_z = 1.0 / np.where(front, in_cam[:, 2], 1.0)
    residual = (in_cam[:, :2] * inv_z[:, None] - rays) / sigma[:, None]
    J = np.zeros((len(points), 2, 6))
    J[:, 0, 0] = J[:, 1, 1] = inv_z
    J[:, :, 2] = -in_cam[:, :2] * inv_z[:, None] ** 2
    J[:, :, 3:] = -J[:, :, :3] @ hat(in_cam)
    J /= sigma[:, None, None]
    weights = np.where(front, 1.0 / (1.0 + 0.25 * np.sum(residual**2, 1)), 0.0)
    return np.where(front[:, None], residual, 0.0), J, weights


def map_covariance(resection: Resection, residual_scale: float) -> np.ndarray:
    """Covariance [6, 6] of the camera in the map: (x y z) and a left rotation vector.

    With C = -R^T t the camera centre and T_cam_map <- exp(rho, omega) T_cam_map:
    dC = -R^T rho, and the rotation of T_map_cam changes by -R^T omega.
    residual_scale: the ratio of observed to assumed standard deviation, at least one.
    """
    R = resection.T_cam_map[:3, :3]
    information = resection.information + 1e-12 * np.eye(6) * np.trace(resection.information)
    A = np.zeros((6, 6))
    A[:3, :3] = A[3:, 3:] = -R.T
    covariance = A @ np.linalg.inv(information) @ A.T * max(residual_scale, 1.0) ** 2
    return 0.5 * (covariance + covariance.T)
