"""Pose from points: recovery with wrong matches, exact Jacobian, honest covariance."""

import numpy as np
import pytest

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import pnp_ransac, pose_jacobian, refine_pose
from feedforward_recon.geometry.transforms import (
    inverse,
    pose_error,
    se3_exp,
    se3_log,
    transform_points,
)

CAMERA = Camera(640, 480, 525.0, 525.0, 319.5, 239.5)
DISTORTED = Camera(640, 480, 525.0, 525.0, 319.5, 239.5, (-0.2, 0.05, 1e-3, -1e-3))


def view(seed, count=200, noise_px=0.5, camera=CAMERA):
    """A random pose, map points [N, 3], their noisy pixels [N, 2] and true depth [N]."""
    rng = np.random.default_rng(seed)
    T_map_cam = se3_exp(rng.normal(0, 1, 6))
    points_cam = np.c_[rng.uniform(-1, 1, count), rng.uniform(-0.7, 0.7, count), np.ones(count)]
    points_cam *= rng.uniform(1.5, 5, (count, 1)) * [0.5, 0.5, 1]
    pixels = camera.project(points_cam) + noise_px * rng.standard_normal((count, 2))
    return T_map_cam, transform_points(T_map_cam, points_cam), pixels, points_cam[:, 2]


@pytest.mark.parametrize('camera', [CAMERA, DISTORTED])
@pytest.mark.parametrize('wrong', [0.0, 0.5, 0.7])
def test_pose_is_found_among_wrong_matches(wrong, camera):
    T_map_cam, points, pixels, _ = view(1, camera=camera)
    count = int(wrong * len(points))
    pixels[:count] = np.random.default_rng(2).uniform((0, 0), (640, 480), (count, 2))
    fit = pnp_ransac(points, pixels, camera)
    distance, angle_deg = pose_error(fit.T_map_cam, T_map_cam)
    assert distance < 0.01 and angle_deg < 0.2
    assert fit.inliers[count:].mean() > 0.95 and fit.inliers[:count].sum() <= 0.02 * len(points)


def test_the_same_input_gives_the_same_pose():
    _, points, pixels, _ = view(3)
    pixels[:100] = np.random.default_rng(2).uniform((0, 0), (640, 480), (100, 2))
    first, second = (pnp_ransac(points, pixels, CAMERA, seed=7) for _ in range(2))
    assert np.array_equal(first.T_map_cam, second.T_map_cam)


def test_noise_alone_has_no_pose():
    rng = np.random.default_rng(4)
    fit = pnp_ransac(rng.uniform(-2, 2, (60, 3)) + [0, 0, 5],
                     rng.uniform((0, 0), (640, 480), (60, 2)), CAMERA)
    assert fit is None or fit.count < 15
    assert pnp_ransac(np.zeros((3, 3)), np.zeros((3, 2)), CAMERA) is None


def test_refinement_reaches_the_truth_without_noise():
    T_map_cam, points, pixels, depth = view(5, noise_px=0)
    start = T_map_cam @ se3_exp(np.array([0.05, -0.04, 0.06, 0.03, -0.02, 0.04]))
    for sensed in (None, depth):
        fit = refine_pose(start, points, pixels, CAMERA, depth=sensed, iterations=20)
        distance, angle_deg = pose_error(fit.T_map_cam, T_map_cam)
        assert distance < 1e-6 and angle_deg < 1e-4


def test_depth_makes_the_pose_more_certain():
    T_map_cam, points, pixels, depth = view(6, count=30)
    loose = refine_pose(T_map_cam, points, pixels, CAMERA)
    tight = refine_pose(T_map_cam, points, pixels, CAMERA, depth=depth)
    assert np.trace(tight.covariance) < np.trace(loose.covariance)


def test_covariance_covers_the_error():
    """Over many draws the squared Mahalanobis error has about its expectation, 6."""
    ratios = []
    for seed in range(60):
        T_map_cam, points, pixels, _ = view(seed, count=25, noise_px=2.0)
        fit = refine_pose(T_map_cam, points, pixels, CAMERA, outlier_px=50)
        error = np.r_[fit.T_map_cam[:3, 3] - T_map_cam[:3, 3],
                      se3_log(fit.T_map_cam @ inverse(T_map_cam))[3:]]
        assert np.linalg.eigvalsh(fit.covariance).min() > 0
        np.testing.assert_allclose(fit.covariance, fit.covariance.T)
        ratios.append(error @ np.linalg.solve(fit.covariance, error))
    assert 3.5 < np.mean(ratios) < 9


def test_jacobian_equals_numeric_differences():
    rng = np.random.default_rng(8)
    points = rng.uniform((-2, -2, 1), (2, 2, 4), (10, 3))
    by_xy, noise, h = 500 / points[:, 2], rng.uniform(0.01, 0.1, 10), 1e-6

    def seen(points):
        x, y, z = points.T
        return np.stack([500 * x / z, 500 * y / z, 1 / z / noise])

    J = pose_jacobian(points.T, by_xy, 1 / points[:, 2]**2 / noise)
    for column in range(6):
        xi = h * np.eye(6)[column]
        numeric = (seen(transform_points(se3_exp(xi), points)) - seen(points)) / h
        np.testing.assert_allclose(J[column], numeric, rtol=1e-4, atol=1e-2)
