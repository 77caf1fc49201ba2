"""Alignment recovers a known transform, ignores outliers, refuses what is not determined."""

import numpy as np
import pytest

from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.geometry.align import align_points, align_points_robust
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp

SCALES = [0.02, 1.0, 37.0]


def similarity(seed, scale, count=60, spread=(3.0, 2.0, 1.0)):
    """Random points, and the same points under a random similarity."""
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(count, 3)) * spread + rng.normal(size=3) * 10
    T = se3_exp(rng.normal(size=6) * [5, 5, 5, 1.5, 1.5, 1.5])
    return source, (scale * source) @ T[:3, :3].T + T[:3, 3], T


def assert_recovered(fit, T, scale, tolerance):
    distance, angle_deg = pose_error(fit.T_target_source, T)
    assert distance < tolerance * max(1, scale)
    assert angle_deg < np.rad2deg(tolerance)
    assert fit.scale == pytest.approx(scale, rel=tolerance)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('align', [align_points, align_points_robust])
def test_exact_similarity_is_recovered(align, scale, seed):
    source, target, T = similarity(seed, scale)
    fit = align(source, target, with_scale=True)
    assert_recovered(fit, T, scale, 1e-9)
    np.testing.assert_allclose(fit.apply(source), target, atol=1e-9 * scale)
    assert fit.rmse < 1e-9 * scale


@pytest.mark.parametrize('count', [3, 4, 50])
def test_points_in_a_plane_suffice_and_are_never_mirrored(count):
    source, target, T = similarity(1, 1.0, count, spread=(2.0, 1.0, 0.0))
    fit = align_points(source, target)
    assert_recovered(fit, T, 1.0, 1e-9)
    assert np.linalg.det(fit.T_target_source[:3, :3]) == pytest.approx(1)


def test_rigid_alignment_keeps_the_scale_of_the_source():
    source, target, _ = similarity(2, 1.05)
    assert align_points(source, target).scale == 1.0


def test_mirrored_points_give_the_best_rotation_not_a_reflection():
    source, _, _ = similarity(3, 1.0, spread=(3, 2, 0.3))
    fit = align_points(source, source * [1, 1, -1])
    assert np.linalg.det(fit.T_target_source[:3, :3]) == pytest.approx(1)
    rng = np.random.default_rng(0)
    for xi in rng.normal(size=(200, 6)) * 0.05:  # no small change is better
        moved = (source @ (se3_exp(xi) @ fit.T_target_source)[:3, :3].T
                 + (se3_exp(xi) @ fit.T_target_source)[:3, 3])
        distance = np.linalg.norm(moved - source * [1, 1, -1], axis=1)
        assert np.sum(distance**2) >= np.sum(fit.residuals**2)


def test_the_least_squares_optimum_has_no_better_neighbour():
    rng = np.random.default_rng(4)
    source, target, _ = similarity(4, 2.0)
    target += rng.normal(size=target.shape) * 0.1
    weights = rng.uniform(0.1, 1, len(source))
    fit = align_points(source, target, weights, with_scale=True)
    best = np.sum(fit.weights * fit.residuals**2)
    for xi in rng.normal(size=(200, 7)) * 1e-3:
        moved = se3_exp(xi[:6]) @ fit.T_target_source
        points = (fit.scale * np.exp(xi[6]) * source) @ moved[:3, :3].T + moved[:3, 3]
        assert np.sum(fit.weights * np.sum((points - target)**2, 1)) >= best


def test_a_weight_of_two_is_the_point_given_twice():
    rng = np.random.default_rng(5)
    source, target, _ = similarity(5, 1.0, 10)
    target += rng.normal(size=target.shape) * 0.2
    twice = align_points(np.vstack([source, source[:4]]), np.vstack([target, target[:4]]))
    weighted = align_points(source, target, np.r_[np.full(4, 2.0), np.ones(6)])
    np.testing.assert_allclose(weighted.T_target_source, twice.T_target_source, atol=1e-12)


def test_points_of_weight_zero_do_not_count():
    source, target, T = similarity(6, 3.0)
    target[:30] += 100.0
    fit = align_points(source, target, np.arange(60) >= 30, with_scale=True)
    assert_recovered(fit, T, 3.0, 1e-9)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('seed', range(5))
def test_cauchy_rejects_forty_percent_gross_outliers(scale, seed):
    rng = np.random.default_rng(seed)
    source, truth, _ = similarity(seed, scale, 200)
    target = truth + rng.normal(size=truth.shape) * 0.01 * scale
    target[:80] = target.mean(0) + rng.normal(size=(80, 3)) * 6 * scale
    fit = align_points_robust(source, target, with_scale=True)
    best = align_points(source, target, np.arange(200) >= 80, with_scale=True)
    error, best_error = (np.linalg.norm(f.apply(source) - truth, axis=1).mean()
                         for f in (fit, best))
    assert error < 2 * best_error + 1e-3 * scale
    assert fit.weights[80:].mean() > 100 * fit.weights[:80].mean()
    plain = align_points(source, target, with_scale=True)
    assert fit.residuals[80:].mean() < 0.05 * plain.residuals[80:].mean()


def test_huber_bounds_the_pull_of_few_outliers():
    source, target, T = similarity(7, 1.0, 200)
    target += np.random.default_rng(7).normal(size=target.shape) * 0.01
    target[:10] += 20.0
    robust, plain = align_points_robust(source, target, loss='huber'), align_points(source, target)
    assert pose_error(robust.T_target_source, T)[0] < 0.1 * pose_error(plain.T_target_source, T)[0]


def test_prior_weights_survive_robust_weighting():
    source, target, T = similarity(8, 1.0, 50)
    target[:30] += [5.0, 0, 0]  # a consistent majority that the caller knows to be wrong
    weights = np.where(np.arange(50) < 30, 0.0, 1.0)
    assert_recovered(align_points_robust(source, target, weights), T, 1.0, 1e-9)


def test_poses_move_with_the_points_they_see():
    source, target, _ = similarity(9, 4.0)
    fit = align_points(source, target, with_scale=True)
    T_source_cam = se3_exp(np.random.default_rng(9).normal(size=(7, 6)))
    T_target_cam = fit.apply_to_poses(T_source_cam)
    in_source = np.einsum('nij,j->ni', inverse(T_source_cam), np.r_[source[0], 1])[:, :3]
    in_target = np.einsum('nij,j->ni', inverse(T_target_cam), np.r_[target[0], 1])[:, :3]
    np.testing.assert_allclose(in_target, 4.0 * in_source, atol=1e-9)


@pytest.mark.parametrize('align', [align_points, align_points_robust])
@pytest.mark.parametrize('source', [
    np.eye(3)[:2],
    np.ones((5, 3)),
    np.linspace(0, 1, 20)[:, None] * [[1.0, 2.0, 3.0]] + 7,
], ids=['two points', 'one place', 'one line'])
def test_undetermined_transforms_are_refused(align, source):
    with pytest.raises(DegenerateError, match='expected'):
        align(source, source + 1.0)


@pytest.mark.parametrize(('source', 'target', 'weights', 'message'), [
    (np.zeros((4, 3)), np.zeros((5, 3)), None, r'shapes \(4, 3\) and \(5, 3\)'),
    (np.zeros((4, 2)), np.zeros((4, 2)), None, r'arrays \[N, 3\]'),
    (np.full((4, 3), np.nan), np.zeros((4, 3)), None, 'found NaN'),
    (np.eye(3), np.eye(3), np.array([1, 1, -1]), 'not negative'),
    (np.eye(3), np.eye(3), np.array([1, 1, np.nan]), 'not negative'),
    (np.eye(3), np.eye(3), np.ones(4), '3 weights'),
])
def test_arrays_that_do_not_correspond_are_refused(source, target, weights, message):
    with pytest.raises(InputError, match=message):
        align_points(source, target, weights)


def test_unknown_loss_is_refused():
    with pytest.raises(InputError, match="'tukey'"):
        align_points_robust(np.eye(3), np.eye(3), loss='tukey')
