"""Bundle adjustment: recovers a known scene, exact Jacobians, monotone cost, fixed gauge."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry import normal_equations
from feedforward_recon.geometry.bundle_rows import (
    BundleProblem,
    BundleState,
    residuals,
    robust_cost,
)
from feedforward_recon.geometry.elimination import Elimination
from feedforward_recon.geometry.normal_equations import linearise, solve
from feedforward_recon.geometry.refine import bundle_adjust
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    se3_exp,
    so3_exp,
    transform_points,
)

FOCAL_PX = 500.0


def scene(seed=0, poses=8, points=300, depth=True, noise_px=0.0):
    """A true scene as a problem: cameras on an arc, random visibility."""
    rng = np.random.default_rng(seed)
    t = np.c_[np.linspace(-1, 1, poses), 0.1 * rng.standard_normal((poses, 2))]
    R = so3_exp(np.c_[0.1 * rng.standard_normal((poses, 2)), 0.1 * rng.standard_normal(poses)])
    T_map_cam = make_transform(R, t)
    X = np.c_[rng.uniform(-2, 2, (points, 2)), rng.uniform(2, 6, points)]
    k, p = np.nonzero(rng.uniform(size=(poses, points)) < 0.6)
    seen = np.isin(p, np.flatnonzero(np.bincount(p, minlength=points) > 1))
    k, p = k[seen], p[seen]
    cam = np.einsum('oij,oj->oi', inverse(T_map_cam)[k][:, :3, :3], X[p]) \
        + inverse(T_map_cam)[k][:, :3, 3]
    xy = cam[:, :2] / cam[:, 2:] + noise_px / FOCAL_PX * rng.standard_normal((len(k), 2))
    inv_depth = 1 / cam[:, 2] if depth else np.full(len(k), np.nan)
    fixed = np.arange(poses) < 2
    return BundleProblem(T_map_cam, X, fixed, k, p, xy, inv_depth, np.ones(len(k)), FOCAL_PX)


def perturbed(problem, seed=1):
    rng = np.random.default_rng(seed)
    T = problem.T_map_cam @ se3_exp(0.02 * rng.standard_normal((len(problem.fixed), 6)))
    T[problem.fixed] = problem.T_map_cam[problem.fixed]
    return replace(problem, T_map_cam=T,
                   points=problem.points + 0.05 * rng.standard_normal(problem.points.shape))


@pytest.mark.parametrize('depth', [True, False])
def test_recovers_a_perturbed_scene(depth):
    true = scene(depth=depth)
    result = bundle_adjust(perturbed(true), 30)
    distance, angle = pose_error(result.T_map_cam, true.T_map_cam)
    assert distance.max() < 1e-4 and angle.max() < 1e-2
    seen = np.unique(true.point_index)
    assert np.median(np.abs(result.points - true.points)[seen]) < 1e-4


def test_outliers_do_not_bend_the_map():
    true = scene(noise_px=0.3)
    rng = np.random.default_rng(3)
    wrong = rng.uniform(size=len(true.xy)) < 0.1
    xy = true.xy + wrong[:, None] * rng.uniform(-0.2, 0.2, true.xy.shape)
    result = bundle_adjust(perturbed(replace(true, xy=xy)), 30)
    assert pose_error(result.T_map_cam, true.T_map_cam)[0].max() < 5e-3


def test_focal_length_is_found():
    true = scene(depth=False)
    stretched = replace(true, xy=true.xy * 1.1, calibration=('focal',))
    result = bundle_adjust(stretched, 60)
    assert result.focal_scale == pytest.approx(1.1, abs=2e-3)


@pytest.mark.parametrize('depth', [True, False])
def test_radial_distortion_is_found(depth):
    """Images of a lens that bends by a tenth in the corners, said to be undistorted."""
    true = scene(depth=depth)
    bent = replace(true, xy=true.xy * (1 - 0.1 * (true.xy**2).sum(1, keepdims=True)))
    result = bundle_adjust(replace(bent, calibration=('radial',)), 60)
    assert result.radial == pytest.approx(-0.1, abs=2e-3)
    assert pose_error(result.T_map_cam, true.T_map_cam)[0].max() < 2e-3
    assert bundle_adjust(bent, 60).radial == 0


def test_focal_length_and_distortion_are_found_together():
    true = scene(depth=False)
    q = (true.xy**2).sum(1, keepdims=True)
    seen = replace(true, xy=1.05 * true.xy * (1 + 0.08 * q), calibration=('focal', 'radial'))
    result = bundle_adjust(seen, 80)
    assert (result.focal_scale, result.radial) == pytest.approx((1.05, 0.08), abs=6e-3)


def numeric_jacobian(problem, state, changes):
    """Derivatives of the residuals, [n, 3, O], by each of the changed states."""
    h = 1e-6
    r = residuals(problem, state).r
    return np.stack([(residuals(problem, changed(h)).r - r) / h for changed in changes])


def blocks(jacobian, weight, other):
    """Products J^T w J of two Jacobians, one for each observation: [O, n, m]."""
    return np.einsum('nio,io,mio->onm', jacobian, weight, other)


def summed(blocks, index, count):
    out = np.zeros((count, *blocks.shape[1:]))
    np.add.at(out, index, blocks)
    return out


def test_normal_equations_equal_those_of_numeric_derivatives():
    problem = replace(scene(poses=4, points=12), calibration=('focal', 'radial', 'shift'),
                      shifted=True)
    state = BundleState(inverse(problem.T_map_cam), problem.points, 1.05, -0.1, 0.02)
    pose = numeric_jacobian(problem, state, [
        lambda h, xi=xi: replace(state, T_cam_map=se3_exp(h * xi) @ state.T_cam_map)
        for xi in np.eye(6)])
    point = numeric_jacobian(problem, state, [
        lambda h, step=step: replace(state, points=state.points + h * step)
        for step in np.eye(3)])
    own = numeric_jacobian(problem, state, [
        lambda h, name=name: replace(state, **{name: getattr(state, name) + h})
        for name in ('focal_scale', 'radial', 'shift')])
    order, rows = Elimination(problem), residuals(problem, state)
    weight = robust_cost(problem, rows)[1]
    system = linearise(problem, order, state, rows)
    columns = np.concatenate([rows.r[None], own])
    free, seen = order.free, order.seen
    expected = {
        'U': summed(blocks(pose, weight, pose), problem.pose_index, 4)[free],
        'V': summed(blocks(point, weight, point), problem.point_index, 12),
        'W': blocks(pose, weight, point)[seen],
        'by_pose': summed(blocks(columns, weight, pose), problem.pose_index, 4)[free],
        'by_point': summed(blocks(columns, weight, point), problem.point_index, 12)}
    for name, values in expected.items():
        np.testing.assert_allclose(np.moveaxis(getattr(system, name), -1, 0), values,
                                   rtol=1e-3, atol=1e-5 * np.abs(values).max(), err_msg=name)
    np.testing.assert_allclose(system.calibration, blocks(own, weight, columns).sum(0), rtol=1e-3)


@pytest.mark.parametrize('calibration', [(), ('focal', 'radial', 'shift')])
def test_a_step_solves_the_whole_system_at_once(calibration):
    """Eliminating the points gives the step that the dense system of all unknowns gives."""
    problem = perturbed(replace(scene(poses=5, points=90), calibration=calibration, shifted=True))
    state = BundleState(inverse(problem.T_map_cam), problem.points)
    order = Elimination(problem)
    system = linearise(problem, order, state, residuals(problem, state))
    damping, n, count, extra = 1e-2, len(order.free), 90, len(calibration)
    A = np.zeros((6 * n + 3 * count + extra,) * 2)
    for i in range(n):
        A[6 * i:6 * i + 6, 6 * i:6 * i + 6] = system.U[..., i]
    for i in range(count):
        at = 6 * n + 3 * i
        A[at:at + 3, at:at + 3] = system.V[..., i]
    for o, (i, j) in enumerate(zip(order.pose, order.point, strict=True)):
        A[6 * i:6 * i + 6, 6 * n + 3 * j:6 * n + 3 * j + 3] = system.W[..., o]
    columns = np.concatenate([np.moveaxis(part, -1, 1).reshape(1 + extra, -1) for part in
                              (system.by_pose, system.by_point)] + [system.calibration.T], 1)
    A[:, len(A) - extra:] = columns[1:].T
    A = np.triu(A) + np.triu(A, 1).T
    A += np.diag(damping * np.diag(A) + 1e-9)
    step = -np.linalg.solve(A, columns[0])
    xi, moved, change = solve(order, system, damping)
    np.testing.assert_allclose(np.concatenate([xi.ravel(), moved.ravel(), change]), step,
                               rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_cost_never_increases(seed):
    problem = perturbed(scene(seed, noise_px=1.0), seed)
    costs = [bundle_adjust(problem, n).cost_after for n in range(0, 8)]
    assert all(b <= a for a, b in zip(costs[:-1], costs[1:], strict=True))
    assert costs[-1] < 0.5 * costs[0]


def test_fixed_poses_are_returned_bit_for_bit():
    problem = perturbed(scene(noise_px=0.5))
    result = bundle_adjust(problem, 5)
    assert np.array_equal(result.T_map_cam[problem.fixed], problem.T_map_cam[problem.fixed])
    assert not np.array_equal(result.T_map_cam, problem.T_map_cam)


def test_moving_the_map_moves_the_result():
    problem = perturbed(scene(noise_px=0.5))
    T_new_map = se3_exp(np.array([1.0, -2, 0.5, 0.3, 0.2, -0.4]))
    moved = replace(problem, T_map_cam=T_new_map @ problem.T_map_cam,
                    points=transform_points(T_new_map, problem.points))
    a, b = bundle_adjust(problem, 6), bundle_adjust(moved, 6)
    np.testing.assert_allclose(T_new_map @ a.T_map_cam, b.T_map_cam, atol=1e-6)
    np.testing.assert_allclose(transform_points(T_new_map, a.points), b.points, atol=1e-4)


def test_a_map_without_a_fixed_pose_is_refused():
    problem = scene()
    with pytest.raises(DegenerateError, match='fixed keyframe'):
        bundle_adjust(replace(problem, fixed=np.zeros(len(problem.fixed), bool)), 3)


def test_a_system_that_rounding_made_indefinite_is_damped(monkeypatch):
    """Without depth one fixed pose leaves the scale free; weak damping may not be enough."""
    true, factor, refused = scene(depth=False), normal_equations.cho_factor, []

    def failing_once(S, **options):
        if not refused:
            refused.append(S)
            raise np.linalg.LinAlgError('not positive definite')
        return factor(S, **options)

    monkeypatch.setattr(normal_equations, 'cho_factor', failing_once)
    result = bundle_adjust(perturbed(true), 30)
    assert refused and result.cost_after < 1e-3 * result.cost_before
