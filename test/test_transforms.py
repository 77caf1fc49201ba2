"""Transforms are a group, over any batch shape; exp and log are inverse, also at the edges."""

import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import (
    hat,
    inverse,
    make_transform,
    matrix_from_quat_xyzw,
    pose_error,
    quat_xyzw_from_matrix,
    rotation_angle_rad,
    se3_exp,
    se3_log,
    so3_exp,
    so3_log,
    transform_points,
)

BATCHES = [(), (1,), (3, 1, 2)]
# Angles where the series, the general formula and the half-turn case meet.
ANGLES = [0.0, 1e-12, 1e-8, 9.9e-5, 1.01e-4, 1e-2, 1.0, 2.5, np.pi - 1e-3, np.pi - 1e-7]


def rng():
    return np.random.default_rng(0)


def tangents(batch, angle=1.0, seed=0):
    """Tangents [..., 6] with rotation of the given angle about random axes."""
    generator = np.random.default_rng(seed)
    axis = generator.normal(size=(*batch, 3))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    return np.concatenate([generator.normal(size=(*batch, 3)) * 3, axis * angle], -1)


def assert_same(a, b, atol=1e-12):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize('batch', BATCHES)
def test_group_axioms(batch):
    a, b, c = (se3_exp(tangents(batch, seed=s)) for s in range(3))
    identity = np.broadcast_to(np.eye(4), (*batch, 4, 4))
    assert_same((a @ b) @ c, a @ (b @ c))
    assert_same(a @ inverse(a), identity)
    assert_same(inverse(a) @ a, identity)
    assert_same(inverse(a @ b), inverse(b) @ inverse(a))
    assert_same(inverse(inverse(a)), a)


@pytest.mark.parametrize('batch', BATCHES)
def test_transforms_act_on_points_as_they_compose(batch):
    a, b = (se3_exp(tangents(batch, seed=s)) for s in range(2))
    points = rng().normal(size=(*batch, 7, 3))
    assert_same(transform_points(a @ b, points), transform_points(a, transform_points(b, points)))
    assert_same(transform_points(inverse(a), transform_points(a, points)), points)
    homogeneous = np.concatenate([points, np.ones((*batch, 7, 1))], -1)
    assert_same(transform_points(a, points),
                np.einsum('...ij,...nj->...ni', a, homogeneous)[..., :3])


def test_one_transform_moves_one_cloud_and_many_move_it_at_once():
    T = se3_exp(tangents((4,)))
    points = rng().normal(size=(5, 3))
    assert_same(transform_points(T, points), np.stack([transform_points(t, points) for t in T]))


@pytest.mark.parametrize('angle', ANGLES)
@pytest.mark.parametrize('batch', BATCHES)
def test_log_inverts_exp(batch, angle):
    xi = tangents(batch, angle)
    # Close to a half turn the axis itself is only known to the square root of the precision.
    atol = 1e-6 if angle > 3 else 1e-11
    assert_same(se3_log(se3_exp(xi)), xi, atol)
    assert_same(so3_log(so3_exp(xi[..., 3:])), xi[..., 3:], atol)


@pytest.mark.parametrize('angle', [*ANGLES, np.pi, 3.5, 7.0])
def test_exp_inverts_log(angle):
    T = se3_exp(tangents((20,), angle))
    assert_same(se3_exp(se3_log(T)), T, 1e-9)
    assert np.all(np.linalg.norm(so3_log(T[:, :3, :3]), axis=-1) <= np.pi + 1e-9)


@pytest.mark.parametrize('angle', [*ANGLES, np.pi])
def test_exp_gives_rotations_of_that_angle(angle):
    R = so3_exp(tangents((20,), angle)[:, 3:])
    assert_same(R @ np.swapaxes(R, -1, -2), np.broadcast_to(np.eye(3), R.shape))
    np.testing.assert_allclose(np.linalg.det(R), 1, atol=1e-12)
    np.testing.assert_allclose(rotation_angle_rad(R), angle, atol=1e-7 if angle > 3 else 1e-12)


def test_exp_equals_the_power_series():
    xi = tangents((), 0.7)
    generator = np.zeros((4, 4))
    generator[:3, :3], generator[:3, 3] = hat(xi[3:]), xi[:3]
    term, total = np.eye(4), np.eye(4)
    for n in range(1, 25):
        term = term @ generator / n
        total = total + term
    assert_same(se3_exp(xi), total)


def test_exp_of_parallel_tangents_adds():
    xi = tangents((3,), 0.4)
    assert_same(se3_exp(xi) @ se3_exp(2 * xi), se3_exp(3 * xi))


@pytest.mark.parametrize('batch', BATCHES)
def test_hat_is_the_cross_product(batch):
    a, b = rng().normal(size=(2, *batch, 3))
    assert_same(np.einsum('...ij,...j->...i', hat(a), b), np.cross(a, b))
    assert_same(hat(a), -np.swapaxes(hat(a), -1, -2))


@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('angle', [0.0, 1e-9, 1.0, 2 * np.pi / 3, np.pi])
def test_quaternions_round_trip(batch, angle):
    R = so3_exp(tangents(batch, angle)[..., 3:])
    quat_xyzw = quat_xyzw_from_matrix(R)
    assert quat_xyzw.shape == (*batch, 4)
    np.testing.assert_allclose(np.linalg.norm(quat_xyzw, axis=-1), 1, atol=1e-12)
    assert_same(matrix_from_quat_xyzw(quat_xyzw), R)
    assert_same(matrix_from_quat_xyzw(-3 * quat_xyzw), R)


def test_half_turns_about_every_axis_have_a_quaternion():
    """Shepperd's four cases, each where its own component is the largest."""
    R = np.stack([np.diag(d) for d in ([1, 1, 1.0], [1, -1, -1], [-1, 1, -1], [-1, -1, 1])])
    np.testing.assert_allclose(np.abs(quat_xyzw_from_matrix(R)), np.eye(4)[[3, 0, 1, 2]])


def test_quaternion_order_is_x_y_z_w():
    quarter_turn_z = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]
    assert_same(matrix_from_quat_xyzw(quarter_turn_z) @ [1, 0, 0], np.array([0, 1.0, 0]))


@pytest.mark.parametrize('bad', [[0, 0, 0, 0], [np.nan, 0, 0, 1], [np.inf, 0, 0, 1]])
def test_impossible_quaternions_are_refused(bad):
    with pytest.raises(InputError, match='quaternion of non-zero length'):
        matrix_from_quat_xyzw(np.array([[0, 0, 0, 1], bad], float))


@pytest.mark.parametrize('batch', BATCHES)
def test_pose_error_is_symmetric_and_sees_both_parts(batch):
    T = se3_exp(tangents(batch))
    moved = T @ se3_exp(np.array([0, 0, 0, 0, 0.3, 0]))
    moved[..., :3, 3] += [3.0, 0, 4.0]
    for pair in ((T, moved), (moved, T)):
        distance, angle_deg = pose_error(*pair)
        assert distance.shape == angle_deg.shape == batch
        np.testing.assert_allclose(distance, 5)
        np.testing.assert_allclose(angle_deg, np.rad2deg(0.3))


def test_make_transform_broadcasts_one_rotation_over_many_positions():
    T = make_transform(np.eye(3), np.arange(12.0).reshape(4, 3))
    assert T.shape == (4, 4, 4)
    np.testing.assert_array_equal(T[2, :3, 3], [6, 7, 8])
