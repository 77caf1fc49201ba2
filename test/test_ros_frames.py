"""Frames of a robot and the scale of its map: laws that hold for every tree and mount."""

from types import SimpleNamespace

import numpy as np
import pytest

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    quat_xyzw_from_matrix,
    se3_exp,
    so3_exp,
    so3_log,
)
from feedforward_recon.ros.frames import R_BODY_OPTICAL, Frames, OdometryScale
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError
from feedforward_recon.ros.tf_sent import SentTransforms

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
    frames.add_acceleration('imu_link', 9.81 * up_imu)
    T_map_cam, source = frames.first_pose(CAMERA, STAMP, metric=True)
    assert source == 'imu'
    np.testing.assert_allclose(T_map_cam[:3, :3] @ R_world_cam[2], [0, 0, 1], atol=1e-9)
    heading = frames.body_pose(T_map_cam, np.eye(6), CAMERA, STAMP, 1.0).T_map_body[:3, 0]
    assert heading[0] > 0 and abs(heading[1]) < 1e-9


def test_an_accelerometer_that_is_pushed_says_nothing(rng):
    frames = robot(rng, odom=False)
    frames.buffer.set(CAMERA, 'imu_link', np.eye(4), 0, static=True)
    for felt in ([0, 0, 12.0], [0, 0, 0], [np.nan, 0, 9.8]):
        frames.add_acceleration('imu_link', np.array(felt))
    assert frames.first_pose(CAMERA, STAMP, metric=True)[1] == 'level base'


def test_a_camera_that_looks_straight_down_has_a_heading():
    frames = Frames(NodeConfig(), TransformBuffer())
    frames.buffer.set(CAMERA, 'imu_link', np.eye(4), 0, static=True)
    for up_optical in ([0, 0, -9.81], [0, 0, 9.81]):
        frames.add_acceleration('imu_link', np.array(up_optical))
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


# -- one parent ---------------------------------------------------------------------------------

@pytest.mark.parametrize('source', ['tf', 'topic'])
def test_odometry_that_was_seen_stays_above_the_robot_when_time_jumps(rng, source):
    frames = robot(rng, odom=False)
    assert frames.child_frame(CAMERA) == 'base_link'
    if source == 'tf':
        frames.buffer.set('odom', 'base_link', np.eye(4), STAMP)
    else:
        frames.take_odometry('odom', 'base_link', np.eye(4), STAMP)
    assert frames.child_frame(CAMERA) == 'odom' and frames.mode(CAMERA) == 'map_to_odom'
    back = STAMP - 4_000_000_000
    frames.buffer.jumped(back)
    assert frames.child_frame(CAMERA) == 'odom'
    with pytest.raises(TransformError, match="'odom' -> 'base_link'"):
        frames.body_pose(np.eye(4), np.eye(6), CAMERA, back, 1.0)
    alone = frames.body_pose(np.eye(4), np.eye(6), CAMERA, back, 1.0, alone=True)
    assert (alone.child_frame, alone.body_frame) == ('', 'base_link')
    frames.forget()
    assert frames.child_frame(CAMERA) == 'base_link'


def test_odometry_stays_remembered_while_its_tree_is_put_together_anew(rng):
    """The topic hangs base_link below odom, then TF tells that base_link hangs elsewhere."""
    frames = robot(rng, odom=False)
    frames.take_odometry('odom', 'base_link', np.eye(4), STAMP)
    assert frames.child_frame(CAMERA) == 'odom'
    frames.buffer.set('base_footprint', 'base_link', random_transform(rng), 0, static=True)
    assert frames.child_frame(CAMERA) == 'odom'
    with pytest.raises(TransformError, match='odom'):
        frames.body_pose(np.eye(4), np.eye(6), CAMERA, STAMP, 1.0)
    frames.take_odometry('odom', 'base_link', np.eye(4), STAMP)
    assert frames.body_pose(np.eye(4), np.eye(6), CAMERA, STAMP, 1.0).child_frame == 'odom'


def test_a_mount_that_moves_is_still_a_mount_after_a_jump(rng):
    frames = robot(rng, odom=False)
    frames.buffer.set('base_link', 'mount', random_transform(rng), STAMP)  # a pan-tilt unit
    told = frames.body_of_camera(CAMERA, STAMP)
    frames.buffer.jumped(0)
    assert frames.child_frame(CAMERA) == 'base_link' and frames.knows_base(CAMERA)
    np.testing.assert_array_equal(frames.body_of_camera(CAMERA, 0), told)
    frames.first_pose(CAMERA, 0, metric=True)


@pytest.mark.parametrize('seed', range(5))
def test_the_odometry_topic_takes_no_frame_its_parent(seed):
    """Odometry of base_link, while TF has base_link below base_footprint."""
    rng = np.random.default_rng(seed)
    frames, T_odom_base = robot(rng, odom=False), random_transform(rng)
    frames.buffer.set('base_footprint', 'base_link', random_transform(rng), 0, static=True)
    frames.take_odometry('odom', 'base_link', T_odom_base, STAMP)
    np.testing.assert_allclose(frames.buffer.lookup('odom', 'base_link', STAMP), T_odom_base,
                               atol=1e-9)
    assert frames.buffer.parent_of('base_link') == 'base_footprint'
    frames.buffer.set('odom', 'base_footprint', np.eye(4), STAMP)
    frames.take_odometry('/odom', 'base_link', T_odom_base, STAMP)  # TF tells it already
    np.testing.assert_array_equal(frames.buffer.lookup('odom', 'base_footprint', STAMP),
                                  np.eye(4))


@pytest.mark.parametrize(('tf_mode', 'edge', 'parent', 'child', 'other'), [
    ('map_to_base', ('odom', 'base_link'), 'map', 'base_link', 'odom'),
    ('map_to_odom', ('world', 'odom'), 'map', 'odom', 'world'),
    ('auto', ('hand', f'{CAMERA}_body'), CAMERA, f'{CAMERA}_body', 'hand')])
def test_no_frame_gets_a_second_parent(rng, tf_mode, edge, parent, child, other):
    frames = robot(rng, tf_mode=tf_mode, odom=False)
    assert frames.conflict(parent, child) == ''
    frames.buffer.set(*edge, np.eye(4), STAMP)
    if parent == 'map':
        assert frames.child_frame(CAMERA) == child
    sentence = frames.conflict(parent, child)
    assert f'{parent} -> {child} is not sent' in sentence
    assert f'stop the publisher of {other} -> {child}' in sentence
    assert ('set tf_mode to auto' in sentence) == (tf_mode != 'auto')


@pytest.mark.parametrize('seed', range(10))
def test_in_mode_auto_whatever_tree_there_is_only_its_root_is_hung_below_the_map(seed):
    rng = np.random.default_rng(seed)
    frames = Frames(NodeConfig(), TransformBuffer())
    names = ['odom', 'base_link', CAMERA, 'x', 'y']
    for _ in range(20):
        parent, child = rng.choice(names, 2, replace=False)
        try:
            if rng.integers(2):
                frames.take_odometry(parent, child, np.eye(4), STAMP)
            else:
                frames.buffer.set(parent, child, np.eye(4), STAMP, bool(rng.integers(2)))
        except TransformError:
            continue  # a loop
        sent = frames.child_frame(CAMERA)
        assert frames.conflict('map', sent) == '' or not frames.buffer.can(sent, CAMERA)


def test_the_map_is_not_hung_below_itself(rng):
    frames = robot(rng, odom=False)
    assert frames.loop('map', frames.child_frame(CAMERA)) == ''
    frames.buffer.set('base_link', 'map', np.eye(4), STAMP)
    sentence = frames.loop('map', frames.child_frame(CAMERA))
    assert 'map below base_link' in sentence and 'base_link -> map' in sentence


def test_map_to_base_hangs_the_robot_below_the_map_though_a_topic_knows_odometry(rng):
    """Nobody sends odom -> base_link on TF: the topic alone gives the robot no parent."""
    frames = robot(rng, odom=False, tf_mode='map_to_base')
    frames.take_odometry('odom', 'base_link', random_transform(rng), STAMP)
    assert frames.child_frame(CAMERA) == 'base_link'
    assert frames.conflict('map', 'base_link') == ''


@pytest.mark.parametrize('early_ns', [-1_000_000_000, 20_000_000])
def test_odometry_that_begins_later_or_lags_still_tells_where_up_is(rng, early_ns):
    frames = robot(rng)
    frames.buffer.set('odom', 'base_link', random_transform(rng), STAMP + 500_000_000)
    T_map_cam, source = frames.first_pose(CAMERA, STAMP + early_ns, metric=True)
    expected, _ = frames.first_pose(CAMERA, max(STAMP, STAMP + early_ns), metric=True)
    assert source == 'odometry'
    np.testing.assert_array_equal(T_map_cam, expected)


def test_of_many_transforms_only_our_own_are_known_as_such(rng):
    def stamped(parent, child, T, stamp_ns):
        turn = quat_xyzw_from_matrix(T[:3, :3])
        stamp = SimpleNamespace(sec=1, nanosec=stamp_ns)
        return SimpleNamespace(
            header=SimpleNamespace(frame_id=parent, stamp=stamp), child_frame_id=child,
            transform=SimpleNamespace(
                translation=SimpleNamespace(**dict(zip('xyz', T[:3, 3].tolist(), strict=True))),
                rotation=SimpleNamespace(**dict(zip('xyzw', turn.tolist(), strict=True)))))

    sent, T = SentTransforms(), random_transform(rng)
    sent.add([stamped('map', 'odom', T, 5)])
    assert stamped('/map', 'odom', T.copy(), 5) in sent
    for theirs in (('map', 'odom', random_transform(rng), 5), ('map', 'odom', T, 6),
                   ('map', 'base_link', T, 5)):
        assert stamped(*theirs) not in sent
    for stamp in range(10, 10_000):
        sent.add([stamped('map', 'odom', T, stamp)])
    assert stamped('map', 'odom', T, 9_999) in sent and stamped('map', 'odom', T, 5) not in sent
    assert stamped('map', 'odom', T, 9_999 - 2000) not in sent


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
