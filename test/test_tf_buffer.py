"""The tree of frames: poses compose, time is honoured, and what is missing gets a name."""

from types import SimpleNamespace

import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    quat_xyzw_from_matrix,
    se3_exp,
    so3_exp,
)
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError

MS, SECOND = 1_000_000, 1_000_000_000


def random_transform(rng):
    return se3_exp(np.r_[rng.normal(0, 2, 3), rng.uniform(-1.7, 1.7, 3)])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def robot(rng):
    """From map over odom and base to camera: two moving edges with samples, one static."""
    buffer = TransformBuffer()
    for stamp in (10 * SECOND, 11 * SECOND):
        buffer.set('map', 'odom', random_transform(rng), stamp)
        buffer.set('odom', 'base', random_transform(rng), stamp)
    buffer.set('base', 'camera', random_transform(rng), 0, static=True)
    return buffer


@pytest.mark.parametrize('seed', range(5))
def test_random_trees_compose_and_invert(seed):
    rng = np.random.default_rng(seed)
    buffer, count = TransformBuffer(), 12
    for child in range(1, count):
        static = bool(rng.integers(2))
        parent = int(rng.integers(child))
        for stamp in (0, SECOND):
            buffer.set(f'f{parent}', f'f{child}', random_transform(rng), stamp, static)
    for _ in range(30):
        a, b, c = (f'f{i}' for i in rng.integers(count, size=3))
        stamp = int(rng.integers(SECOND))
        T_a_b, T_b_c, T_a_c = (buffer.lookup(*pair, stamp) for pair in ((a, b), (b, c), (a, c)))
        np.testing.assert_allclose(T_a_b @ T_b_c, T_a_c, atol=1e-9)
        np.testing.assert_allclose(buffer.lookup(b, a, stamp), inverse(T_a_b), atol=1e-9)
        assert buffer.can(a, b)


def test_an_edge_reads_back_and_its_direction_is_that_of_the_name(rng):
    buffer, T_map_base = TransformBuffer(), random_transform(rng)
    buffer.set('/map', 'base', T_map_base, 5)
    np.testing.assert_allclose(buffer.lookup('map', '/base', 5), T_map_base, atol=1e-12)
    assert buffer.parent_of('base') == 'map' and buffer.parent_of('map') is None


def test_motion_at_constant_speed_is_interpolated_exactly(rng):
    axis, speed = rng.normal(size=3), rng.normal(size=3)
    R_start = so3_exp(rng.normal(size=3))

    def truth(stamp_ns):
        t = stamp_ns / SECOND
        return make_transform(R_start @ so3_exp(0.9 * t * axis), 3.0 + t * speed)

    buffer = TransformBuffer()
    for stamp in range(0, 2 * SECOND, 100 * MS):
        buffer.set('odom', 'base', truth(stamp), stamp)
    for stamp in rng.integers(0, 1900 * MS, 30):
        np.testing.assert_allclose(buffer.lookup('odom', 'base', int(stamp)), truth(stamp),
                                   atol=1e-9)


def test_stamps_of_this_century_keep_their_nanoseconds():
    buffer, start = TransformBuffer(), 1_790_000_000 * SECOND
    for stamp, x in ((start, 0.0), (start + 1000, 1.0)):
        buffer.set('odom', 'base', make_transform(np.eye(3), [x, 0, 0]), stamp)
    assert buffer.lookup('odom', 'base', start + 250)[0, 3] == pytest.approx(0.25)


@pytest.mark.parametrize(('stamp', 'kind', 'words'), [
    (11 * SECOND + 12 * MS, 'future', r"'odom' -> 'base'.*12\.0 ms earlier.*future"),
    (10 * SECOND - 7 * MS, 'past', r"'odom' -> 'base'.*7\.0 ms later.*past")])
def test_nothing_is_extrapolated(robot, stamp, kind, words):
    with pytest.raises(TransformError, match=words) as caught:
        robot.lookup('odom', 'camera', stamp)
    assert caught.value.kind == kind


def test_static_edges_hold_at_any_stamp(robot):
    np.testing.assert_array_equal(robot.lookup('base', 'camera', 0),
                                  robot.lookup('base', 'camera', 99 * SECOND))
    assert not robot.moves('base', 'camera') and robot.moves('map', 'camera')


@pytest.mark.parametrize(('asked', 'nearest'), [(0, 10), (10.5, 10.5), (99, 11)])
def test_the_nearest_known_is_told_where_the_stamp_is_not_known(robot, asked, nearest):
    np.testing.assert_array_equal(robot.lookup_near('map', 'camera', int(asked * SECOND)),
                                  robot.lookup('map', 'camera', int(nearest * SECOND)))


def test_each_edge_is_told_as_it_is_nearest_to_the_stamp(robot):
    robot.set('odom', 'base', np.eye(4), 12 * SECOND)
    np.testing.assert_array_equal(
        robot.lookup_near('map', 'base', 12 * SECOND),
        robot.lookup('map', 'odom', 11 * SECOND) @ robot.lookup('odom', 'base', 12 * SECOND))


@pytest.mark.parametrize(('target', 'source', 'words'), [
    ('map', 'imu', "no transform with 'imu'.*between 'map' and 'imu'"),
    ('map', 'arm', "two trees.*'map' and 'torso'"),
])
def test_a_missing_edge_is_named(robot, target, source, words):
    robot.set('torso', 'arm', np.eye(4), 0)
    assert not robot.can(target, source)
    for ask in (lambda: robot.lookup(target, source, 0),
                lambda: robot.lookup_near(target, source, 0),
                lambda: robot.moves(target, source)):
        with pytest.raises(TransformError, match=words) as caught:
            ask()
        assert caught.value.kind == 'missing'


def test_a_frame_is_where_it_is_even_when_nobody_speaks_of_it():
    np.testing.assert_array_equal(TransformBuffer().lookup('camera', '/camera', 5), np.eye(4))


@pytest.mark.parametrize(('parent', 'child'), [('camera', 'map'), ('base', 'odom'),
                                               ('base', 'base')])
def test_loops_are_refused_and_the_tree_stays(robot, parent, child):
    before = robot.lookup('map', 'camera', 11 * SECOND)
    with pytest.raises(TransformError, match='tree') as caught:
        robot.set(parent, child, np.eye(4), 11 * SECOND)
    assert caught.value.kind == 'loop'
    np.testing.assert_array_equal(robot.lookup('map', 'camera', 11 * SECOND), before)


def test_a_new_parent_replaces_the_old_one(robot):
    robot.set('map', 'base', np.eye(4), 20 * SECOND)
    assert robot.parent_of('base') == 'map'
    np.testing.assert_array_equal(robot.lookup('map', 'base', 20 * SECOND), np.eye(4))


def test_history_is_bounded_and_the_newest_stays():
    buffer = TransformBuffer(history_s=1.0)
    for stamp in range(0, 100 * SECOND, 50 * MS):
        buffer.set('odom', 'base', np.eye(4), stamp)
    newest = 100 * SECOND - 50 * MS
    buffer.lookup('odom', 'base', newest)
    buffer.lookup('odom', 'base', newest - SECOND)
    for stamp in (0, newest - SECOND - 1):
        with pytest.raises(TransformError, match='past'):
            buffer.lookup('odom', 'base', stamp)


def test_late_samples_find_their_place_and_repeated_stamps_replace():
    def at(x):
        return make_transform(np.eye(3), [x, 0, 0])
    buffer = TransformBuffer()
    for stamp, x in ((0, 0.0), (200, 8.0), (100, 1.0), (100, 2.0)):
        buffer.set('odom', 'base', at(x), stamp * MS)
    assert buffer.lookup('odom', 'base', 50 * MS)[0, 3] == pytest.approx(1.0)
    assert buffer.lookup('odom', 'base', 150 * MS)[0, 3] == pytest.approx(5.0)


def test_a_jump_back_clears_the_edge_that_jumped_and_no_other(robot):
    robot.set('odom', 'base', np.eye(4), 2 * SECOND)
    np.testing.assert_array_equal(robot.lookup('odom', 'base', 2 * SECOND), np.eye(4))
    robot.lookup('map', 'odom', 11 * SECOND)
    with pytest.raises(TransformError, match='future'):
        robot.lookup('odom', 'base', 10 * SECOND)


def test_clear_keeps_what_is_static(robot):
    robot.clear()
    assert robot.can('base', 'camera') and not robot.can('map', 'camera')


def test_a_jump_of_time_forgets_where_but_not_on_what(robot):
    """/tf_static is sent once, and a robot hangs below its odometry at any time."""
    mount = robot.lookup('base', 'camera', 0)
    robot.set('base', 'camera', mount, 11 * SECOND, static=True)  # its stamp says nothing
    last = robot.lookup('map', 'camera', 11 * SECOND)
    robot.jumped(2 * SECOND)
    np.testing.assert_array_equal(robot.lookup('base', 'camera', 2 * SECOND), mount)
    assert robot.ancestry('camera') == ['camera', 'base', 'odom', 'map']
    for stamp in (2 * SECOND, 10 * SECOND):
        with pytest.raises(TransformError, match='none since the stamps jumped') as caught:
            robot.lookup('map', 'camera', stamp)
        assert caught.value.kind == 'future'
    np.testing.assert_array_equal(robot.lookup_near('map', 'camera', 2 * SECOND), last)
    for parent, child in (('map', 'odom'), ('odom', 'base')):
        robot.set(parent, child, np.eye(4), 2 * SECOND)
    np.testing.assert_array_equal(robot.lookup('map', 'camera', 2 * SECOND), mount)


def test_what_jumped_before_the_images_is_not_forgotten(robot):
    robot.set('odom', 'base', np.eye(4), 2 * SECOND)
    robot.jumped(2 * SECOND + 30 * MS)
    np.testing.assert_array_equal(robot.lookup('odom', 'base', 2 * SECOND), np.eye(4))
    with pytest.raises(TransformError):
        robot.lookup('map', 'odom', 11 * SECOND)


def test_what_another_topic_tells_never_replaces_what_tf_tells(robot, rng):
    T_odom_base = robot.lookup('odom', 'base', 11 * SECOND)
    robot.set('wheels', 'base', random_transform(rng), 11 * SECOND, on_tf=False)
    np.testing.assert_array_equal(robot.lookup('odom', 'base', 11 * SECOND), T_odom_base)
    robot.set('earth', 'map', np.eye(4), 11 * SECOND, on_tf=False)
    assert robot.parent_of('map') == 'earth' and robot.parent_of('map', on_tf=True) is None
    robot.set('earth', 'map', np.eye(4), 12 * SECOND)
    assert robot.parent_of('map', on_tf=True) == 'earth'
    robot.lookup('earth', 'map', 11 * SECOND)


@pytest.mark.parametrize('T', [np.full((4, 4), np.nan), np.diag([2.0, 2, 2, 1]),
                               np.diag([1.0, 1, -1, 1]), np.eye(3)])
def test_what_is_not_rigid_is_refused(T):
    buffer = TransformBuffer()
    with pytest.raises(InputError, match="rigid transform 'a' -> 'b'"):
        buffer.set('a', 'b', T, 0)
    assert not buffer.can('a', 'b')


def test_the_buffer_keeps_its_own_copy():
    buffer, T = TransformBuffer(), np.eye(4)
    buffer.set('a', 'b', T, 0)
    T[0, 3] = 9
    assert buffer.lookup('a', 'b', 0)[0, 3] == 0


def stamped(parent, child, T, stamp_ns, scale=1.0):
    """Stands for a geometry_msgs/TransformStamped."""
    x, y, z, w = scale * quat_xyzw_from_matrix(T[:3, :3])
    sec, nanosec = divmod(stamp_ns, SECOND)
    return SimpleNamespace(
        header=SimpleNamespace(frame_id=parent, stamp=SimpleNamespace(sec=sec, nanosec=nanosec)),
        child_frame_id=child, transform=SimpleNamespace(
            translation=SimpleNamespace(x=T[0, 3], y=T[1, 3], z=T[2, 3]),
            rotation=SimpleNamespace(x=x, y=y, z=z, w=w)))


def test_messages_are_taken_and_bad_transforms_do_not_stop_the_good_ones(rng):
    buffer, T, stamp = TransformBuffer(), random_transform(rng), 3 * SECOND + 5
    refused = buffer.take([
        stamped('a', 'b', np.eye(4), 0, scale=0.0), stamped('', 'c', T, 0),
        stamped('d', 'd', T, 0), stamped('map', 'base', T, stamp)])
    np.testing.assert_allclose(buffer.lookup('map', 'base', stamp), T, atol=1e-12)
    assert len(refused) == 3 and not buffer.can('a', 'b')
    for sentence, word in zip(refused, ('quaternion', 'frame_id', 'tree'), strict=True):
        assert word in sentence


def test_static_messages_are_static(rng):
    buffer, T = TransformBuffer(), random_transform(rng)
    assert buffer.take([stamped('base', 'camera', T, 9)], True) == []
    np.testing.assert_allclose(buffer.lookup('base', 'camera', 5 * SECOND), T, atol=1e-12)
