"""Odometry on TF over real DDS: no frame ever gets a second parent, whatever comes late.

tf2 takes the newest parent that it hears of, and has no transform between two of them. So the
law of every test here: in all that anybody sends on /tf and /tf_static, a frame has one parent.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros('tf2_msgs') or missing_ros():
    pytest.skip(missing_ros() or missing_ros('tf2_msgs'), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from ros_support.camera import OPTICAL, FakeCamera, stamps, walk
from std_srvs.srv import Trigger

from feedforward_recon.geometry.transforms import inverse, make_transform, so3_exp
from feedforward_recon.ros.convert import (
    header_msg,
    matrix_from_pose,
    matrix_from_transform,
    pose_msg,
    transform_msg,
)
from feedforward_recon.ros.frames import R_BODY_OPTICAL
from feedforward_recon.ros.tf_messages import TFMessage

QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'tf_wait_s': 0.3, 'info_wait_s': 0.5}
STEP_NS = 100_000_000
T_BASE_CAM = make_transform(so3_exp(np.array([0, 0, 0.2])) @ R_BODY_OPTICAL,
                            np.array([0.3, 0, 0.2]))
UPRIGHT = 'the map is upright by: '


@pytest.fixture(scope='module')
def frames():
    return walk(5, 16)


class Robot:
    """A camera on a robot: its mount on /tf_static, its odometry when a test says so."""

    def __init__(self, start_node, probe, frames, *, topic=False, **parameters):
        """Start a mapping node; topic: the odometry is published as Odometry too."""
        self.probe, self.frames = probe, frames
        self.poses = probe.collect(PoseWithCovarianceStamped, '/pose', depth=1000)
        self.heard = [probe.collect(TFMessage, '/tf', depth=1000),
                      probe.collect(TFMessage, '/tf_static', latched=True)]
        self.tf = probe.publisher(TFMessage, '/tf', depth=100)
        self.static = probe.publisher(TFMessage, '/tf_static', latched=True)
        self.static.publish(TFMessage(transforms=[transform_msg(T_BASE_CAM, 'base_link', OPTICAL,
                                                                0)]))
        self.topic = probe.publisher(Odometry, '/odom') if topic else None
        self.node = start_node('mapping_node', parameters={**QUICK, **parameters})
        self.camera = FakeCamera(probe)
        assert self.camera.heard() and probe.spin_until(self.tf.get_subscription_count), \
            self.node.output

    def T_odom_base(self, frame):
        """Odometry that does not drift, from a start with another place and heading."""
        T_odom_start = make_transform(so3_exp(np.array([0, 0, 0.7])), np.array([3.0, -2, 0]))
        T_start_cam = inverse(self.frames[0].T_map_cam) @ frame.T_map_cam
        return T_odom_start @ T_BASE_CAM @ T_start_cam @ inverse(T_BASE_CAM)

    def drive(self, *frames):
        """Odometry at the stamps of images."""
        for frame in frames:
            T = self.T_odom_base(frame)
            self.tf.publish(TFMessage(transforms=[transform_msg(T, 'odom', 'base_link',
                                                                frame.stamp_ns)]))
            if self.topic is not None:
                message = Odometry(header=header_msg('odom', frame.stamp_ns),
                                   child_frame_id='base_link')
                message.pose.pose = pose_msg(T)
                self.topic.publish(message)

    def look(self, *frames, drive=False):
        """Send images, each after the pose of the last; returns how many had a pose."""
        posed = 0
        for frame in frames:
            before = len(self.poses)
            if drive:
                self.drive(frame)
            self.camera.send(frame)
            posed += self.probe.spin_until(lambda before=before: len(self.poses) > before, 3)
        return posed

    @property
    def everything(self):
        """All transforms that anybody has sent."""
        self.probe.spin_for(0.3)
        return [t for messages in self.heard for m in messages for t in m.transforms]

    def below_map(self):
        """What the node has sent below the map, newest last."""
        return [t for t in self.everything if t.header.frame_id == 'map']

    def parents(self):
        """Every frame with the parents that it was given, in the order of hearing."""
        found = {}
        for t in self.everything:
            found.setdefault(t.child_frame_id, []).append(t.header.frame_id)
        return {child: list(dict.fromkeys(parents)) for child, parents in found.items()}

    def codes(self):
        report = json.loads(self.probe.call(Trigger, '/mapping_node/doctor').message)
        return {cause['code']: cause['sentence'] for cause in report['causes']}

    def upright(self):
        """What the log says of where up is."""
        return [line.split(UPRIGHT)[1] for line in self.node.output.splitlines()
                if UPRIGHT in line]


@pytest.fixture
def robot(start_node, probe, frames):
    return lambda **how: Robot(start_node, probe, frames, **how)


def assert_one_parent(robot, above_robot=('odom',)):
    parents = robot.parents()
    assert all(len(found) == 1 for found in parents.values()), parents
    assert {t.child_frame_id for t in robot.below_map()} == set(above_robot), parents
    if above_robot == ('odom',):
        T_map_base = matrix_from_transform(robot.below_map()[-1]) @ robot.T_odom_base(
            next(f for f in robot.frames if f.stamp_ns == stamps(robot.poses)[-1]))
        np.testing.assert_allclose(T_map_base, matrix_from_pose(robot.poses[-1].pose.pose),
                                   atol=1e-6)


def test_odometry_that_starts_a_second_after_the_images_is_waited_for(robot, frames):
    robot = robot(tf_wait_s=6.0)
    for steps in range(10, 0, -1):
        robot.camera.send(replace(frames[0], stamp_ns=frames[0].stamp_ns - steps * STEP_NS))
        robot.probe.spin_for(0.1)
    assert not robot.poses and not robot.below_map()
    robot.drive(frames[0])
    robot.probe.spin_for(0.3)  # an image that overtakes the first odometry starts no map
    assert robot.look(*frames, drive=True) == len(frames), robot.node.output
    assert_one_parent(robot)
    assert robot.upright() == ['odometry']


def test_odometry_that_is_announced_is_waited_for_with_transforms_not_with_poses(robot, frames):
    """The topic has a publisher that sends nothing for longer than an image may wait."""
    robot = robot(topic=True)
    robot.probe.spin_for(0.5)
    assert robot.look(*frames[:5]) >= 4, robot.node.output
    assert not robot.below_map()
    assert 'without a transform' in robot.codes()['TF_LATE']
    assert robot.look(*frames[5:], drive=True) == len(frames) - 5
    assert_one_parent(robot)
    assert robot.upright() == ['level base']
    assert robot.probe.call(Trigger, '/mapping_node/reset').success
    assert robot.look(*[replace(f, stamp_ns=f.stamp_ns + 20 * STEP_NS) for f in frames[:3]]) == 3
    assert robot.upright() == ['level base', 'odometry'], 'a new map, a new line'


@pytest.mark.slow
def test_a_bag_that_loops_gives_no_frame_a_second_parent(robot, frames):
    robot = robot()
    assert robot.look(*frames, drive=True) >= len(frames) - 1, robot.node.output
    assert robot.look(*frames[:3]) == 3, 'odometry is late: the poses come all the same'
    assert 'STAMPS_JUMP_BACK' in robot.codes() and 'TF_LATE' in robot.codes()
    assert robot.look(*frames[3:], drive=True) == len(frames) - 3
    assert_one_parent(robot)
    robot.drive(*frames[:4])  # the third round: this time odometry jumps before the images do
    robot.probe.spin_for(0.3)
    assert robot.look(*frames[1:4]) == 3
    assert_one_parent(robot)
    times = [stamps(robot.below_map()).count(f.stamp_ns) for f in frames[1:5]]
    assert times == [2, 2, 3, 2], 'images 1 and 2 of the second round came before the odometry'
    assert len(robot.upright()) == 1


def test_images_earlier_than_the_first_odometry_have_poses_but_no_transform(robot, frames):
    robot = robot()
    robot.drive(*frames[8:])
    robot.probe.spin_for(0.3)
    assert robot.look(*frames[:4]) == 4, robot.node.output
    assert not robot.below_map()
    assert 'past' in robot.codes()['TF_LATE']
    assert robot.look(*frames[8:]) == len(frames) - 8
    assert_one_parent(robot)
    assert robot.upright() == ['odometry']


def test_when_odometry_begins_the_robot_is_at_once_no_longer_hung_below_the_map(robot, frames):
    """Nothing told that it would come: until then the root of the tree is the robot."""
    robot = robot()
    robot.probe.spin_for(0.5)
    assert robot.look(*frames[:6]) >= 5, robot.node.output
    assert {t.child_frame_id for t in robot.below_map()} == {'base_link'}
    robot.drive(frames[5])
    robot.probe.spin_for(0.2)
    assert robot.look(*frames[6:], drive=True) == len(frames) - 6
    sent = [(t.child_frame_id, stamps([t])[0]) for t in robot.below_map()]
    assert max(stamp for child, stamp in sent if child == 'base_link') <= frames[5].stamp_ns
    assert {child for child, _ in sent[-5:]} == {'odom'}
    assert robot.upright() == ['level base']


def test_map_to_base_is_refused_where_odometry_carries_the_robot(robot, frames):
    robot = robot(tf_mode='map_to_base')
    assert robot.look(*frames[:6], drive=True) >= 5, robot.node.output
    assert not robot.below_map()
    sentence = robot.codes()['TWO_PARENTS']
    assert 'odom -> base_link' in sentence and 'set tf_mode to auto' in sentence


def test_somebody_else_who_sends_map_to_odom_is_named_and_we_are_not(robot, frames):
    robot = robot()
    assert robot.look(*frames[:8], drive=True) >= 7, robot.node.output
    assert robot.below_map() and 'TWO_PUBLISHERS' not in robot.codes()
    robot.tf.publish(TFMessage(transforms=[transform_msg(np.eye(4), 'map', 'odom',
                                                         frames[7].stamp_ns)]))
    robot.probe.spin_for(0.2)
    assert robot.look(frames[8], drive=True) == 1
    assert 'map -> odom' in robot.codes()['TWO_PUBLISHERS']
