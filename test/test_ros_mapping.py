"""mapping_node over real DDS: poses, transforms, clouds and services of a mapped room."""

import json

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry, Path
from ros_support.camera import CAMERA, OPTICAL, FakeCamera, positions, stamps, walk
from sensor_msgs.msg import CameraInfo, CompressedImage, PointCloud2
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import MarkerArray

from feedforward_recon.geometry.align import align_points
from feedforward_recon.io.encode import JPEG_FORMAT, jpeg
from feedforward_recon.ros.convert import (
    header_msg,
    info_msg,
    matrix_from_pose,
    matrix_from_transform,
)
from feedforward_recon.ros.pointcloud import cloud_from_msg
from feedforward_recon.ros.tf_messages import TFMessage

QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'tf_wait_s': 0.2, 'info_wait_s': 1.0}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 50)


@pytest.fixture(scope='module')
def elsewhere():
    return walk(11, 4)


def body_truth(frames):
    """True poses of the body (x forward) in the frame of a map with z up at the start."""
    R = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    T_body_cam = np.eye(4)
    T_body_cam[:3, :3] = R
    T_map_world = T_body_cam @ np.linalg.inv(frames[0].T_map_cam)
    return [T_map_world @ f.T_map_cam @ np.linalg.inv(T_body_cam) for f in frames]


def test_a_walk_becomes_poses_transforms_and_a_map(start_node, probe, needs_tf, frames,
                                                   elsewhere, tmp_path):
    node = start_node('mapping_node', parameters={**QUICK, 'map': tmp_path / 'map',
                                                  'cloud_period_s': 0.2})
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    odometry = probe.collect(Odometry, '/odometry')
    transforms = probe.collect(TFMessage, '/tf')
    clouds = probe.collect(PointCloud2, '/cloud_map', latched=True)
    paths = probe.collect(Path, '/path', latched=True)
    markers = probe.collect(MarkerArray, '/markers', latched=True)
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    mapped = frames[::2]
    assert camera.play(mapped, poses) == len(mapped), node.output

    # Poses: stamps of the images, metres, x forward, honest covariance.
    assert stamps(poses) == [f.stamp_ns for f in mapped]
    true = np.array(body_truth(mapped))
    found = np.array([matrix_from_pose(p.pose.pose) for p in poses])
    assert np.sqrt(((found - true)[:, :3, 3] ** 2).sum(1).mean()) < 0.03
    assert poses[0].header.frame_id == 'map'
    for message in poses:
        covariance = np.array(message.pose.covariance).reshape(6, 6)
        assert np.linalg.eigvalsh(covariance).min() > 0
    assert probe.spin_until(lambda: len(odometry) == len(transforms) == len(poses))
    assert odometry[-1].pose == poses[-1].pose
    assert odometry[-1].child_frame_id == f'{OPTICAL}_body'

    # TF: map -> camera with the image's stamps, and the body below it.
    sent = {t.child_frame_id: t for m in transforms for t in m.transforms}
    assert sent[OPTICAL].header.frame_id == 'map'
    assert {t.header.stamp.sec * 10**9 + t.header.stamp.nanosec for m in transforms
            for t in m.transforms if t.child_frame_id == OPTICAL} == set(stamps(poses))
    T_map_body = matrix_from_transform(sent[OPTICAL]) \
        @ matrix_from_transform(sent[f'{OPTICAL}_body'])
    np.testing.assert_allclose(T_map_body, found[-1], atol=1e-6)

    # The cloud lies on the surfaces: seen from a mapped camera, at the rendered depth.
    assert probe.spin_until(lambda: clouds and len(cloud_from_msg(clouds[-1])) > 3000, 10)
    cloud = cloud_from_msg(clouds[-1])
    assert len(np.unique(cloud.rgb, axis=0)) > 50
    assert on_surface_share(cloud.xyz, mapped, true) > 0.95
    assert probe.spin_until(lambda: paths and markers, 5)
    assert len(paths[-1].poses) > 5 and len(markers[-1].markers[0].points) >= 16 * 5
    first = paths[-1].poses[0]
    assert stamps([first]) == [mapped[0].stamp_ns]

    # Services: found on a held-out image, refused elsewhere, saved.
    camera.send(frames[21])
    probe.spin_for(0.5)
    reply = probe.call(Trigger, '/localize')
    assert reply.success, reply.message
    answer = json.loads(reply.message)
    np.testing.assert_allclose(answer['pose']['position'], body_truth(frames)[21][:3, 3],
                               atol=0.05)
    assert answer['stamp_ns'] == frames[21].stamp_ns and answer['inliers'] > 20
    camera.send(elsewhere[0])
    probe.spin_for(0.5)
    reply = probe.call(Trigger, '/localize')
    assert not reply.success and json.loads(reply.message)['pose'] is None
    saved = probe.call(Trigger, '/mapping_node/save_map')
    assert saved.success and (tmp_path / 'map' / 'memory.safetensors').is_file(), saved.message

    # Modes.
    assert probe.call(SetBool, '/mapping_node/pause', SetBool.Request(data=True)).success
    count = len(poses)
    camera.send(frames[31])
    probe.spin_for(0.5)
    assert len(poses) == count
    doctor = json.loads(probe.call(Trigger, '/mapping_node/doctor').message)
    assert doctor['paused'] and 'PAUSED' in [cause['code'] for cause in doctor['causes']]
    assert probe.call(SetBool, '/mapping_node/pause', SetBool.Request(data=False)).success
    mode = probe.call(SetBool, '/mapping_node/set_localization_mode', SetBool.Request(data=True))
    assert mode.success
    camera.play([frames[33]], poses)
    doctor = json.loads(probe.call(Trigger, '/mapping_node/doctor').message)
    assert doctor['mode'] == 'localization' and doctor['scale_source'] == 'depth'
    reset = probe.call(Trigger, '/mapping_node/reset')
    assert reset.success and 'forgot' in reset.message
    node.interrupt()
    assert node.wait(5) == 0, node.output


def on_surface_share(xyz, frames, T_map_body):
    """Share of the points [N, 3] that some camera sees within 5 cm of its rendered depth."""
    from feedforward_recon.geometry.transforms import inverse, transform_points

    T_body_cam = np.eye(4)
    T_body_cam[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    near = np.zeros(len(xyz), bool)
    for frame, T in zip(frames, T_map_body, strict=True):
        points = transform_points(inverse(T @ T_body_cam), xyz)
        with np.errstate(invalid='ignore'):
            u, v = np.rint(frame.camera.project(points)).T
            inside = (points[:, 2] > 0) & (u >= 0) & (u < 320) & (v >= 0) & (v < 240)
        rows = np.flatnonzero(inside)
        depth = frame.depth[v[rows].astype(int), u[rows].astype(int)]
        near[rows] |= np.abs(depth - points[rows, 2]) < 0.05
    return near.mean()


def test_a_monocular_walk_is_right_up_to_scale(start_node, probe, frames):
    node = start_node('mapping_node', parameters=QUICK)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe, depth=False)
    assert camera.heard(), node.output
    camera.play(frames[:40], poses, timeout_s=0.7)
    assert len(poses) > 20, node.output
    true = {f.stamp_ns: T[:3, 3] for f, T in zip(frames, body_truth(frames), strict=True)}
    fit = align_points(positions(poses), np.array([true[s] for s in stamps(poses)]),
                       with_scale=True)
    assert fit.rmse < 0.03
    report = json.loads(probe.call(Trigger, '/mapping_node/doctor').message)
    assert report['scale_source'] == 'unknown'


def test_compressed_images_wait_for_a_calibration_of_their_size(start_node, probe, frames):
    """The message does not tell the size: what was calibrated otherwise starts no map."""
    node = start_node('mapping_node', parameters={
        **QUICK, 'image_transport': 'compressed', 'use_depth': False})
    image = probe.publisher(CompressedImage, '/image/compressed')
    info = probe.publisher(CameraInfo, '/camera_info')
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')

    def sees(done, camera):
        for frame in frames:
            info.publish(info_msg(camera, OPTICAL, frame.stamp_ns))
            image.publish(CompressedImage(header=header_msg(OPTICAL, frame.stamp_ns),
                                          format=JPEG_FORMAT, data=jpeg(frame.image).tobytes()))
            if probe.spin_until(done, 0.3):
                return True
        return False

    right = frames[0].camera
    assert sees(lambda: 'expected a calibration for 320x240' in node.output,
                right.resized((640, 480))), node.output
    assert not poses
    assert sees(lambda: len(poses) > 0, right), node.output


def test_offline_no_image_is_lost_that_waits_for_its_calibration(start_node, probe, frames):
    node = start_node('mapping_node', parameters={**QUICK, 'info_wait_s': 60.0,
                                                  'queue': 'offline'})
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe)
    assert camera.ready() and probe.is_known_to('/mapping_node'), node.output
    info, camera.info = camera.info, None
    sent = frames[:40:2]
    for frame in sent:
        camera.send(frame)
        probe.spin_for(0.05)
    assert not poses
    info.publish(info_msg(CAMERA, OPTICAL, sent[-1].stamp_ns))
    assert probe.spin_until(lambda: len(poses) == len(sent)), node.output
    assert stamps(poses) == [f.stamp_ns for f in sent]
