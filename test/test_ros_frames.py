"""Frames of a robot and the scale of its map: laws that hold for every tree and mount."""

import numpy as np
import pytest

from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    se3_exp,
    so3_exp,
    so3_log,
)
from feedforward_recon.node_config import NodeConfig
from feedforward_recon.ros.frames import R_BODY_OPTICAL, Frames, OdometryScale
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError

MS, STAMP = 1_000_000, 5_000_000_000
CAMERA = 'camera_optical_frame'


def random_transform(rng, spread_m=1.0):
    return se3_exp(np.r_[rng.normal(0, spread_m, 3), rng.uniform(-1.5, 1.5, 3)])


def random_covariance(rng):
    L = rng.normal(size=(6, 6)) * np.r_[[0.02] * 3, [0.01] * 3][:, None]
    return L @ L.T + 1e-8 * np.eye(6)


def robot(rng, *, odom=True, base=True, unit=1.0, tf_mode='auto'):
    """A robot on TF: odom -> base_link (moving) -> mount -> camera; lengths in 1 / unit m."""
    buffer = TransformBuffer()
    edges = [('odom', 'base_link', False)] * odom + [('base_link', 'mount', True),
                                                     ('mount', CAMERA, True)] * base
    for parent, child, static in edges:
        T = random_transform(rng)
        T[:3, 3] *= unit
        buffer.set(parent, child, T, 0 if static else STAMP, static)
    return Frames(NodeConfig(tf_mode=tf_mode), buffer)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


# -- frames -------------------------------------------------------------------------------------

def test_optical_axes_become_body_axes():
    forward, right, down = R_BODY_OPTICAL @ np.eye(3)[[2, 0, 1]][:, :, None]
    np.testing.assert_array_equal(np.hstack([forward, right, down]).T,
                                  [[1, 0, 0], [0, -1, 0], [0, 0, -1]])


def test_a_camera_alone_that_moves_forward_is_a_body_that_moves_along_x():
    frames = Frames(NodeConfig(), TransformBuffer())
    T_map_first, source = frames.first_pose(CAMERA, STAMP, metric=True)
    forward = make_transform(np.eye(3), [0, 0, 0.5])
    for T_map_cam, x in ((T_map_first, 0), (T_map_first @ forward, 0.5)):
        body = frames.body_pose(T_map_cam, np.eye(6), CAMERA, STAMP, 1.0)
        np.testing.assert_allclose(body.T_map_body, make_transform(np.eye(3), [x, 0, 0]),
                                   atol=1e-12)
        np.testing.assert_allclose(body.T_map_child, T_map_cam, atol=1e-12)
    assert (source, body.body_frame, body.child_frame) == ('level camera', f'{CAMERA}_body',
                                                           CAMERA)
    assert not body.from_tf


@pytest.mark.parametrize('seed', range(5))
def test_a_mounted_camera_starts_where_the_robot_stands_and_follows_it(seed):
    rng = np.random.default_rng(seed)
    frames = robot(rng, odom=False)
    T_map_first, source = frames.first_pose(CAMERA, STAMP, metric=True)
    T_base_cam = frames.buffer.lookup('base_link', CAMERA, STAMP)
    moved = make_transform(so3_exp(np.array([0, 0, 0.3])), [0.4, 0.1, 0])
    for T_map_base in (np.eye(4), moved):
        body = frames.body_pose(T_map_base @ inverse(np.eye(4)) @ T_base_cam, np.eye(6), CAMERA,
                                STAMP, 1.0)
        np.testing.assert_allclose(body.T_map_body, T_map_base, atol=1e-12)
    np.testing.assert_allclose(T_map_first, T_base_cam, atol=1e-12)
    assert (source, body.body_frame, body.from_tf) == ('level base', 'base_link', True)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize(('tf_mode', 'tree', 'child'), [
    ('auto', {}, 'odom'), ('auto', {'odom': False}, 'base_link'),
    ('auto', {'odom': False, 'base': False}, CAMERA), ('map_to_odom', {}, 'odom'),
    ('map_to_base', {'odom': False}, 'base_link'),
    ('map_to_camera', {'odom': False, 'base': False}, CAMERA)])
def test_what_is_sent_puts_the_camera_where_it_was_measured(seed, tf_mode, tree, child):
    rng = np.random.default_rng(seed)
    frames = robot(rng, tf_mode=tf_mode, **tree)
    T_map_cam, metres_per_unit = random_transform(rng), 2.5
    body = frames.body_pose(T_map_cam, random_covariance(rng), CAMERA, STAMP, metres_per_unit)
    T_child_cam = frames.buffer.lookup(child, CAMERA, STAMP) if child != CAMERA else np.eye(4)
    in_metres = make_transform(T_map_cam[:3, :3], 2.5 * T_map_cam[:3, 3])
    assert body.child_frame == child
    np.testing.assert_allclose(body.T_map_child @ T_child_cam, in_metres, atol=1e-9)
    np.testing.assert_allclose(body.T_map_body @ inverse(body.T_cam_body), in_metres, atol=1e-9)


def test_nothing_is_sent_in_mode_none_but_the_pose_is_told(rng):
    frames = robot(rng, tf_mode='none')
    assert frames.mode(CAMERA) == 'none'
    body = frames.body_pose(np.eye(4), np.eye(6), CAMERA, STAMP, 1.0)
    assert body.child_frame == '' and body.body_frame == 'base_link'


@pytest.mark.parametrize('seed', range(5))
def test_an_unknown_unit_is_never_added_to_metres(seed):
    """A robot ten times as large has the same poses while the unit of the map is unknown."""
    told = []
    for size in (1.0, 10.0):
        rng = np.random.default_rng(seed)
        frames = robot(rng, odom=False, unit=size)
        rng = np.random.default_rng(seed + 100)
        T_map_cam, covariance = random_transform(rng), random_covariance(rng)
        body = frames.body_pose(T_map_cam, covariance, CAMERA, STAMP, None)
        np.testing.assert_allclose(body.T_map_body[:3, 3], T_map_cam[:3, 3])
        told.append((body.T_map_body, body.covariance, body.T_map_child,
                     frames.first_pose(CAMERA, STAMP, metric=False)[0],
                     frames.camera_pose(body.T_map_body, CAMERA, STAMP, None)))
        np.testing.assert_allclose(told[-1][-1], T_map_cam, atol=1e-9)
    for small, large in zip(*told, strict=True):
        np.testing.assert_allclose(large, small, atol=1e-9)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('metres_per_unit', [1.0, 0.3, 4.0])
def test_an_initial_pose_of_the_robot_is_the_pose_of_its_camera(seed, metres_per_unit):
    rng = np.random.default_rng(seed)
    frames, T_map_cam = robot(rng), random_transform(rng)
    body = frames.body_pose(T_map_cam, np.eye(6), CAMERA, STAMP, metres_per_unit)
    np.testing.assert_allclose(
        frames.camera_pose(body.T_map_body, CAMERA, STAMP, metres_per_unit), T_map_cam,
        atol=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_the_covariance_of_the_body_is_that_of_its_motion_and_stays_positive(seed):
    rng = np.random.default_rng(seed)
    frames, T_map_cam, covariance = robot(rng), random_transform(rng), random_covariance(rng)
    body = frames.body_pose(T_map_cam, covariance, CAMERA, STAMP, 2.0)
    J, step = np.zeros((6, 6)), 1e-6
    for column, change in enumerate(step * np.eye(6)):
        turned = make_transform(so3_exp(change[3:]) @ T_map_cam[:3, :3],
                                2.0 * T_map_cam[:3, 3] + change[:3]) @ body.T_cam_body
        J[:, column] = np.r_[turned[:3, 3] - body.T_map_body[:3, 3], so3_log(
            turned[:3, :3] @ body.T_map_body[:3, :3].T)] / step
    metres = np.diag([2.0] * 3 + [1.0] * 3)
    np.testing.assert_allclose(body.covariance, J @ metres @ covariance @ metres @ J.T,
                               atol=1e-3 * np.abs(body.covariance).max())
    np.testing.assert_array_equal(body.covariance, body.covariance.T)
    assert np.linalg.eigvalsh(body.covariance).min() > 0


@pytest.mark.parametrize('seed', range(5))
def test_gravity_makes_the_map_upright_without_turning_its_heading(seed):
    rng = np.random.default_rng(seed)
    frames = robot(rng, odom=False)
    T_cam_imu = random_transform(rng)
    frames.buffer.set(CAMERA, 'imu_link', T_cam_imu, 0, static=True)
    R_world_cam = so3_exp(rng.uniform(-1, 1, 3))
    up_imu = T_cam_imu[:3, :3].T @ R_world_cam[2]
    frames.felt_gravity('imu_link', 9.81 * up_imu)
    T_map_cam, source = frames.first_pose(CAMERA, STAMP, metric=True)
    assert source == 'imu'
    np.testing.assert_allclose(T_map_cam[:3, :3] @ R_world_cam[2], [0, 0, 1], atol=1e-9)
    heading = frames.body_pose(T_map_cam, np.eye(6), CAMERA, STAMP, 1.0).T_map_body[:3, 0]
    assert heading[0] > 0 and abs(heading[1]) < 1e-9


def test_an_accelerometer_that_is_pushed_says_nothing(rng):
    frames = robot(rng, odom=False)
    frames.buffer.set(CAMERA, 'imu_link', np.eye(4), 0, static=True)
    for felt in ([0, 0, 12.0], [0, 0, 0], [np.nan, 0, 9.8]):
        frames.felt_gravity('imu_link', np.array(felt))
    assert frames.first_pose(CAMERA, STAMP, metric=True)[1] == 'level base'


def test_a_camera_that_looks_straight_down_has_a_heading():
    frames = Frames(NodeConfig(), TransformBuffer())
    frames.buffer.set(CAMERA, 'imu_link', np.eye(4), 0, static=True)
    for up_optical in ([0, 0, -9.81], [0, 0, 9.81]):
        frames.felt_gravity('imu_link', np.array(up_optical))
        T_map_cam, _ = frames.first_pose(CAMERA, STAMP, metric=True)
        np.testing.assert_allclose(T_map_cam[:3, :3] @ T_map_cam[:3, :3].T, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(T_map_cam[:3, :3] @ up_optical, [0, 0, 9.81], atol=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_odometry_gives_roll_and_pitch_but_no_yaw(seed):
    rng = np.random.default_rng(seed)
    frames = robot(rng)
    R_odom_base = frames.buffer.lookup('odom', 'base_link', STAMP)[:3, :3]
    T_map_cam, source = frames.first_pose(CAMERA, STAMP, metric=True)
    R_map_base = frames.body_pose(T_map_cam, np.eye(6), CAMERA, STAMP, 1.0).T_map_body[:3, :3]
    assert source == 'odometry'
    np.testing.assert_allclose(R_map_base[2], R_odom_base[2], atol=1e-9)
    assert R_map_base[0, 0] > 0 and abs(R_map_base[1, 0]) < 1e-9


def test_what_tf_lacks_is_named_and_no_pose_is_made_up(rng):
    frames = robot(rng, base=False, tf_mode='map_to_base')
    assert frames.missing(CAMERA) == (('base_link', CAMERA),)
    with pytest.raises(TransformError, match=CAMERA):
        frames.body_pose(np.eye(4), np.eye(6), CAMERA, STAMP, 1.0)
    late = robot(rng)
    with pytest.raises(TransformError, match='future'):
        late.body_pose(np.eye(4), np.eye(6), CAMERA, STAMP + 10 * MS, 1.0)


# -- scale --------------------------------------------------------------------------------------

def driven(scale, path, metres_per_unit, noise_m=0.0, seed=0):
    """Feed positions [N, 3] in metres, the map's divided by its unit; says when it was sure."""
    rng = np.random.default_rng(seed)
    for index, position in enumerate(path):
        seen = (position + noise_m * rng.normal(size=3)) / metres_per_unit
        if scale.add(seen, position):
            return index
    return None


def straight(count=100, step_m=0.05):
    return np.outer(np.arange(count) * step_m, [1.0, 0, 0])


@pytest.mark.parametrize('metres_per_unit', [0.02, 1.0, 35.0])
def test_odometry_finds_the_unit_of_the_map_and_keeps_it(metres_per_unit):
    scale = OdometryScale()
    assert driven(scale, straight(), metres_per_unit, noise_m=0.01) is not None
    assert scale.metres_per_unit == pytest.approx(metres_per_unit, rel=0.1)
    found = scale.metres_per_unit
    for position in straight(400) + 7:
        scale.add(position / (3 * metres_per_unit), position)
    assert scale.metres_per_unit == found


def test_a_robot_that_stands_or_turns_on_the_spot_tells_no_scale():
    scale = OdometryScale()
    assert driven(scale, np.zeros((200, 3)), 2.0, noise_m=0.01) is None


def test_one_displacement_seen_many_times_is_one_piece_of_evidence():
    """0.25 m with an error of a third, and then a stop: that is no scale."""
    scale = OdometryScale()
    scale.add(np.zeros(3), np.zeros(3))
    for _ in range(100):
        assert not scale.add(np.array([0.25 / 3, 0, 0]), np.array([0.25, 0, 0]))
    assert scale.metres_per_unit is None


def test_a_map_that_does_not_follow_the_odometry_gets_no_scale():
    rng = np.random.default_rng(1)
    scale = OdometryScale()
    for position in straight():
        scale.add(rng.normal(0, 1, 3), position)
    assert scale.metres_per_unit is None
