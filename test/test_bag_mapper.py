"""bag_mapper: the same map every time, upright and in metres by what the bag tells."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('rosbags', reason='bags need the extra [bag]')

from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from feedforward_recon.console.terminal import run
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    quat_xyzw_from_matrix,
    se3_exp,
    so3_exp,
)
from feedforward_recon.io.bag_writer import BagTopics, write_bag
from feedforward_recon.ros.bag_mapper import app
from feedforward_recon.ros.frames import T_BODY_OPTICAL
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.synthetic import Room, render_walk

STORE = get_typestore(Stores.ROS2_HUMBLE)
CAMERA, FPS = Camera.from_fov(70.0, (320, 240)), 10.0
FRAME = BagTopics().camera_frame
PITCH = so3_exp(np.array([0, np.deg2rad(20), 0]))  # the camera looks down by 20 degrees
T_BASE_CAM = make_transform(PITCH, np.array([0.1, 0.0, 0.4])) @ T_BODY_OPTICAL
QUICK = [word for setting in ('slots=8000', 'cells=2000', 'samples=20_000')
         for word in ('--set', f'memory.{setting}')]


@pytest.fixture(scope='module')
def frames():
    room = Room.generate(5)
    steps = room.walk(240, seed=0, fps=FPS)[:60:2]
    return list(render_walk(room, CAMERA, steps, fps=FPS / 2, noise=1.0, seed=1))


@pytest.fixture(scope='module', params=['sqlite3', 'mcap'])
def bag(request, frames, tmp_path_factory):
    path = tmp_path_factory.mktemp('bag') / request.param
    write_bag(path, frames[:15], request.param, ground_truth=True)
    return path


@pytest.fixture
def mapped(capsys):
    """Run bag_mapper and return its summary."""
    def call(bag, out, *options):
        code = run(app, ['--bag', str(bag), '--map', str(out), '--json', *QUICK, *options])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)
    return call


def message(name, **values):
    return STORE.types[name](**values)


def header(stamp_ns, frame_id):
    stamp = message('builtin_interfaces/msg/Time', sec=stamp_ns // 10**9,
                    nanosec=stamp_ns % 10**9)
    return message('std_msgs/msg/Header', stamp=stamp, frame_id=frame_id)


def xyz(kind, values):
    x, y, z = map(float, values)
    return message(f'geometry_msgs/msg/{kind}', x=x, y=y, z=z)


def turn(T):
    x, y, z, w = map(float, quat_xyzw_from_matrix(T[:3, :3]))
    return message('geometry_msgs/msg/Quaternion', x=x, y=y, z=z, w=w)


def static_tf(*edges):
    transforms = [message('geometry_msgs/msg/TransformStamped', header=header(0, parent),
                          child_frame_id=child, transform=message(
                              'geometry_msgs/msg/Transform', translation=xyz('Vector3', T[:3, 3]),
                              rotation=turn(T)))
                  for parent, child, T in edges]
    return '/tf_static', 0, message('tf2_msgs/msg/TFMessage', transforms=transforms)


def odometry(stamp_ns, T_odom_base, topic='/odom'):
    pose = message('geometry_msgs/msg/PoseWithCovariance', covariance=np.zeros(36),
                   pose=message('geometry_msgs/msg/Pose', orientation=turn(T_odom_base),
                                position=xyz('Point', T_odom_base[:3, 3])))
    still = message('geometry_msgs/msg/TwistWithCovariance', covariance=np.zeros(36),
                    twist=message('geometry_msgs/msg/Twist', linear=xyz('Vector3', [0] * 3),
                                  angular=xyz('Vector3', [0] * 3)))
    return topic, stamp_ns, message(
        'nav_msgs/msg/Odometry', header=header(stamp_ns, 'odom'), child_frame_id='base_link',
        pose=pose, twist=still)


def imu(stamp_ns, frame_id, acceleration):
    return '/imu', stamp_ns, message(
        'sensor_msgs/msg/Imu', header=header(stamp_ns, frame_id), orientation=turn(np.eye(4)),
        orientation_covariance=np.zeros(9), angular_velocity=xyz('Vector3', [0] * 3),
        angular_velocity_covariance=np.zeros(9),
        linear_acceleration=xyz('Vector3', acceleration),
        linear_acceleration_covariance=np.zeros(9))


@pytest.fixture
def bag_with(frames, tmp_path):
    """A bag of the walk with further messages (topic, stamp_ns, content)."""
    def write(*extra, count=2):
        write_bag(tmp_path / 'images', frames[:count])
        with Reader(tmp_path / 'images') as images, Writer(
                tmp_path / 'bag', version=8, storage_plugin=StoragePlugin.MCAP) as writer:
            topics = {c.topic: writer.add_connection(c.topic, c.msgtype, typestore=STORE)
                      for c in images.connections}
            for topic, stamp_ns, content in extra:
                kind = content.__msgtype__
                if topic not in topics:
                    topics[topic] = writer.add_connection(topic, kind, typestore=STORE)
                writer.write(topics[topic], stamp_ns, STORE.serialize_cdr(content, kind))
            for connection, stamp_ns, raw in images.messages():
                writer.write(topics[connection.topic], stamp_ns, raw)
        return tmp_path / 'bag'
    return write


def first_pose(path):
    return load_map(path).trajectory().T_map_cam[0]


def test_the_same_bag_gives_the_same_trajectory_twice(bag, mapped, tmp_path):
    first, second = (mapped(bag, tmp_path / name) for name in ('first', 'second'))
    assert first['trajectory_sha256'] == second['trajectory_sha256']
    assert first['frames'] == first['tracked'] == 15 and first['scale_source'] == 'depth'
    shorter = mapped(bag, tmp_path / 'shorter', '--max-frames', '14')
    assert shorter['trajectory_sha256'] != first['trajectory_sha256']
    poses = (tmp_path / 'first' / 'trajectory.tum').read_text().splitlines()
    assert len(poses) == 16 and poses == (tmp_path / 'second' /
                                          'trajectory.tum').read_text().splitlines()


def test_poses_of_another_mapper_in_the_bag_change_nothing(bag, mapped, tmp_path):
    """The bag has map -> camera on /tf: what we are about to say ourselves."""
    summary = mapped(bag, tmp_path / 'map', '--max-frames', '2')
    assert summary['up_source'] == 'level camera'
    np.testing.assert_allclose(first_pose(tmp_path / 'map'), T_BODY_OPTICAL, atol=1e-12)


def test_the_map_stands_on_the_base_that_tf_tells(bag_with, mapped, tmp_path):
    summary = mapped(bag_with(static_tf(('base_link', FRAME, T_BASE_CAM))), tmp_path / 'map')
    assert summary['up_source'] == 'level base'
    np.testing.assert_allclose(first_pose(tmp_path / 'map'), T_BASE_CAM, atol=1e-9)


def test_frames_have_the_names_of_the_parameter_file(bag_with, mapped, tmp_path):
    (tmp_path / 'robot.yaml').write_text('/**:\n  ros__parameters:\n    base_frame: body\n')
    summary = mapped(bag_with(static_tf(('body', FRAME, T_BASE_CAM))), tmp_path / 'map',
                     '--params-file', str(tmp_path / 'robot.yaml'))
    assert summary['up_source'] == 'level base'


def test_gravity_makes_a_tilted_camera_upright(bag_with, mapped, tmp_path):
    """An IMU in the camera feels up; what it felt while it was shaken, or later, is not used."""
    up_cam = (PITCH @ T_BODY_OPTICAL[:3, :3]).T @ [0, 0, 9.81]
    T_cam_imu = make_transform(so3_exp(np.array([0.4, -1.0, 2.0])), np.zeros(3))
    up_imu = T_cam_imu[:3, :3].T @ up_cam
    bag = bag_with(static_tf((FRAME, 'imu_link', T_cam_imu)), imu(0, 'imu_link', up_imu),
                   imu(10**6, 'imu_link', 2 * up_imu), imu(10**11, 'imu_link', -up_imu))
    assert mapped(bag, tmp_path / 'map')['up_source'] == 'imu'
    np.testing.assert_allclose(first_pose(tmp_path / 'map')[:3, :3],
                               PITCH @ T_BODY_OPTICAL[:3, :3], atol=1e-9)


def test_odometry_gives_a_monocular_map_its_metres(bag_with, mapped, frames, tmp_path):
    T_odom_world = se3_exp(np.array([1, 2, 0, 0, 0, 0.7])) @ T_BODY_OPTICAL \
        @ inverse(frames[0].T_map_cam)
    moves = [odometry(f.stamp_ns, T_odom_world @ f.T_map_cam @ inverse(T_BASE_CAM))
             for f in frames]
    bag = bag_with(static_tf(('base_link', FRAME, T_BASE_CAM)), *moves, count=len(frames))
    summary = mapped(bag, tmp_path / 'map', '--set', 'use_depth=false')
    assert summary['depth_topic'] == '' and summary['scale_source'] == 'odometry'
    assert summary['up_source'] == 'odometry'
    trajectory = load_map(tmp_path / 'map').trajectory()
    true = {f.stamp_ns: f.T_map_cam[:3, 3] for f in frames}
    fit = align_points(summary['metres_per_unit'] * trajectory.positions,
                       np.array([true[s] for s in trajectory.stamps_ns]), with_scale=False)
    assert fit.rmse < 0.03


def test_bad_input_is_one_sentence_and_code_2(bag_with, frames, capsys, tmp_path):
    def refused(*arguments):
        assert run(app, [*map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == '' and len(captured.err.strip().splitlines()) == 1
        return captured.err

    out = ('--map', tmp_path / 'map')
    two = bag_with(*(odometry(0, np.eye(4), topic) for topic in ('/odom', '/wheels')))
    assert 'expected a folder, video or bag' in refused('--bag', tmp_path / 'none', *out)
    assert 'choose with --odom-topic' in refused('--bag', two, *out)
    assert '/odom, /wheels' in refused('--bag', two, *out, '--odom-topic', '/x')
    assert 'on topic /y' in refused('--bag', two, *out, '--image-topic', '/y')
    assert 'unknown setting tracking.foo' in refused('--bag', two, *out, '--set',
                                                     'tracking.foo=1')
    assert '--map' in refused('--bag', two)
    import cv2

    cv2.imwrite(str(tmp_path / 'image.png'), frames[0].image)
    assert 'use `ffrecon map`' in refused('--bag', tmp_path / 'image.png', *out)
    assert not (tmp_path / 'map').exists()


def test_no_ros_is_needed():
    code = ("import sys\nfor name in ('rclpy', 'sensor_msgs', 'geometry_msgs'): "
            'sys.modules[name] = None\nimport feedforward_recon.ros.bag_mapper')
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
