"""Life cycle, several robots, and the transform tree of a robot with odometry."""

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import OPTICAL, FakeCamera, stamps, walk

from feedforward_recon.geometry.transforms import inverse, make_transform, so3_exp
from feedforward_recon.ros.convert import (
    matrix_from_pose,
    matrix_from_transform,
    transform_msg,
)
from feedforward_recon.ros.frames import R_BODY_OPTICAL
from feedforward_recon.ros.tf_messages import TFMessage

QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'tf_wait_s': 0.5, 'info_wait_s': 0.5}
# Where the camera sits: 30 cm ahead, 20 cm up, looking 15 degrees to the left.
T_BASE_CAM = make_transform(so3_exp(np.array([0, 0, np.radians(15)])) @ R_BODY_OPTICAL,
                            np.array([0.3, 0, 0.2]))


@pytest.fixture(scope='module')
def frames():
    return walk(5, 40)


def test_every_transition_works_also_while_inferring(start_node, probe, frames):
    node = start_node('mapping_node', parameters={**QUICK, 'autostart': False}, fresh=True)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    name = '/mapping_node'
    assert probe.state(name) == 'unconfigured'
    assert probe.change_state(name, 'configure') and probe.state(name) == 'inactive'
    camera = FakeCamera(probe)
    probe.spin_for(0.5)
    assert camera.image.get_subscription_count() == 0, 'an inactive node listens'
    assert probe.change_state(name, 'activate')
    assert camera.heard(), node.output
    assert camera.play(frames[:5], poses) == 5
    for frame in frames[5:12]:  # more than it can have used when told to stop
        camera.send(frame)
    assert probe.change_state(name, 'deactivate') and probe.state(name) == 'inactive'
    probe.spin_for(1.0)
    count = len(poses)
    probe.spin_for(0.5)
    assert len(poses) == count, 'an inactive node publishes'
    assert probe.change_state(name, 'activate') and camera.heard()
    assert camera.play(frames[12:15], poses) == 3, 'the map did not survive a pause'
    assert probe.change_state(name, 'deactivate') and probe.change_state(name, 'cleanup')
    assert probe.state(name) == 'unconfigured'
    assert probe.change_state(name, 'configure') and probe.change_state(name, 'activate')
    assert camera.heard()
    count = len(poses)
    assert camera.play(frames[:3], poses) == 3
    first = matrix_from_pose(poses[count].pose.pose)
    np.testing.assert_allclose(first, np.eye(4), atol=1e-9)  # a new map starts anew
    for frame in frames[3:9]:
        camera.send(frame)
    node.interrupt()
    assert node.wait(5) == 0, node.output


def test_two_robots_share_a_domain_and_nothing_else(start_node, probe, frames, needs_tf):
    cameras, poses, transforms = [], [], []
    for name in ('left', 'right'):
        node = start_node('mapping_node', parameters=QUICK,
                          remap={'__ns': f'/{name}', '/tf': 'tf', '/tf_static': 'tf_static'})
        poses.append(probe.collect(PoseWithCovarianceStamped, f'/{name}/pose'))
        transforms.append(probe.collect(TFMessage, f'/{name}/tf'))
        cameras.append(FakeCamera(probe, f'/{name}'))
    shared = probe.collect(TFMessage, '/tf')
    assert all(camera.heard() for camera in cameras), node.output
    for left, right in zip(frames[:6], frames[10:16], strict=True):
        cameras[0].send(left)
        cameras[1].send(right)
        probe.spin_until(lambda s=left.stamp_ns, t=right.stamp_ns: s in stamps(poses[0])
                         and t in stamps(poses[1]), 3)
    assert stamps(poses[0]) == [f.stamp_ns for f in frames[:6]]
    assert stamps(poses[1]) == [f.stamp_ns for f in frames[10:16]]
    assert transforms[0] and transforms[1] and not shared


class Odometry:
    """A robot that carries the camera: /tf_static of the mount and a drifting odom -> base."""

    def __init__(self, probe, frames):
        self.tf = probe.publisher(TFMessage, '/tf', depth=100)
        static = probe.publisher(TFMessage, '/tf_static', latched=True)
        static.publish(TFMessage(transforms=[transform_msg(T_BASE_CAM, 'base_link', OPTICAL,
                                                           0)]))
        T_base0 = frames[0].T_map_cam @ inverse(T_BASE_CAM)
        self.T_start_base = {f.stamp_ns: inverse(T_base0) @ f.T_map_cam @ inverse(T_BASE_CAM)
                             for f in frames}
        # The odometry began elsewhere, with another heading.
        self.T_odom_start = make_transform(so3_exp(np.array([0, 0, 0.7])), np.array([3.0, -2, 0]))

    def T_odom_base(self, stamp_ns):
        return self.T_odom_start @ self.T_start_base[stamp_ns]

    def send(self, stamp_ns):
        self.tf.publish(TFMessage(transforms=[
            transform_msg(self.T_odom_base(stamp_ns), 'odom', 'base_link', stamp_ns)]))


@pytest.mark.parametrize('depth', [True, False])
def test_with_odometry_only_map_to_odom_is_sent(start_node, probe, frames, needs_tf, depth):
    robot = Odometry(probe, frames)
    node = start_node('mapping_node', parameters=QUICK)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    transforms = probe.collect(TFMessage, '/tf')
    camera = FakeCamera(probe, depth=depth)
    assert camera.heard() and probe.spin_until(robot.tf.get_subscription_count), node.output
    for frame in frames:
        robot.send(frame.stamp_ns)
        count = len(poses)
        camera.send(frame)
        probe.spin_until(lambda count=count: len(poses) > count, 2)
    probe.spin_for(0.3)
    sent = [t for m in transforms for t in m.transforms if t.header.frame_id == 'map']
    assert sent, node.output
    assert {t.child_frame_id for t in sent} == {'odom'}
    last = stamps(poses)[-1]
    T_map_base = matrix_from_transform(sent[-1]) @ robot.T_odom_base(last)
    pose = matrix_from_pose(poses[-1].pose.pose)
    if depth:
        np.testing.assert_allclose(T_map_base, pose, atol=1e-6)
        # From the first pose on: images that overtake the odometry are left out before a map.
        moved = inverse(matrix_from_pose(poses[0].pose.pose)) @ pose
        true = inverse(robot.T_start_base[stamps(poses)[0]]) @ robot.T_start_base[last]
        np.testing.assert_allclose(moved[:3, 3], true[:3, 3], atol=0.03)
    else:  # the scale comes from the odometry and then holds
        known = stamps(sent)[0]
        assert known < frames[-5].stamp_ns, 'the scale came too late to be tested'
        first = next(p for p in poses if stamps([p])[0] >= known)
        moved = pose[:3, 3] - matrix_from_pose(first.pose.pose)[:3, 3]
        true = robot.T_start_base[last] - robot.T_start_base[stamps([first])[0]]
        assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(true[:3, 3]), rel=0.1)
    # Sent again on a timer, dated ahead of the last image.
    assert any(t.header.stamp.sec * 10**9 + t.header.stamp.nanosec > last for t in sent)
