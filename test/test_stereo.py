"""Stereo pairs: depth at pixels, rectification, residuals of the right image, metric maps."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig, TrackingConfig
from feedforward_recon.errors import InputError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.bundle_rows import BundleProblem
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.refine import bundle_adjust
from feedforward_recon.geometry.stereo import StereoRig, from_rectification
from feedforward_recon.geometry.transforms import inverse, make_transform, so3_exp
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.io.bag_writer import BagTopics, write_bag
from feedforward_recon.io.stereo import beside
from feedforward_recon.mapping.adjustment import bundle_problem
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.stereo_shift import shift_inv_depth
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, right_image
from feedforward_recon.types import Frame, Trajectory

BASELINE_M = 0.1
CAMERA = Camera.from_fov(65.0, (480, 360))
OTHER = Camera(480, 360, 372.0, 374.0, 236.0, 182.0, (-0.15, 0.05, 0.001, -0.0005, 0.0))
# The right camera of a pair as it is screwed together: turned by a degree or two, a little ahead.
MOUNTED = make_transform(so3_exp(np.deg2rad([0.8, -1.5, 1.2])), np.array([0.1, 0.003, -0.004]))
# A turn about the vertical axis by a quarter of a degree, which no single pair can show.
TURNED = make_transform(so3_exp(np.deg2rad([0, 0.25, 0])), np.array([BASELINE_M, 0, 0]))


@pytest.fixture(scope='module')
def room():
    return Room.generate(3)


@pytest.fixture(scope='module')
def walk(room):
    """24 pairs of a walk, one every 2 or 3 cm."""
    return [stereo_frame(room, pose, index) for index, pose
            in enumerate(room.walk(240, seed=0)[20:116:4])]


@pytest.fixture(scope='module')
def encoder():
    return CompactEncoder.load(config=MapperConfig().encoder)


def stereo_frame(room, T_world_cam, index=0, left=CAMERA, **right):
    image = room.render(left, T_world_cam)[0]
    pair = right_image(room, left, T_world_cam, BASELINE_M, **right)
    return Frame(10**9 + index * 10**8, image, None, left, f'{index}', T_world_cam, pair)


def view_of(frame):
    return Preparation(TrackingConfig()).view(frame, 0)


def corners(image):
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.goodFeaturesToTrack(gray, 400, 0.01, 8)[:, 0].astype(float)


def relative_errors(room, frame):
    """Share of the corners with a depth, and how far these are off, as a share."""
    px = corners(frame.image)
    measured = view_of(frame).depth_at(px)
    u, v = np.rint(px).astype(int).T
    true = room.render(frame.camera, frame.T_map_cam)[1][v, u]
    known = measured > 0
    return known.mean(), np.abs(measured - true)[known] / true[known]


def mapped(frames, encoder):
    mapper = Mapper(MapperConfig(), encoder)
    estimates = [mapper.process(frame) for frame in frames]
    return mapper, estimates, mapper.finish()


def ate(scene, frames, alignment='se3'):
    truth = Trajectory(np.array([f.stamp_ns for f in frames]),
                       np.stack([f.T_map_cam for f in frames]))
    return absolute_trajectory_error(scene.trajectory, truth, alignment)


# Depth at pixels

@pytest.mark.parametrize('pair', [
    {}, {'right': OTHER, 'T_left_right': MOUNTED}, {'left': OTHER, 'T_left_right': MOUNTED}])
def test_depth_is_that_of_the_room_also_of_cameras_that_are_not_rectified(room, pair):
    """The depth is that of the left camera as it stands, not of a rectified one."""
    found, error = relative_errors(room, stereo_frame(room, room.walk(240, seed=0)[40], **pair))
    assert found > 0.75
    assert np.median(error) < 0.006
    assert np.percentile(error, 90) < 0.03


def test_principal_points_that_differ_are_no_depth(room):
    shifted = replace(CAMERA, cx=CAMERA.cx - 5)
    _, error = relative_errors(room, stereo_frame(room, room.walk(240, seed=0)[40], right=shifted))
    assert np.median(error) < 0.006


def test_nothing_is_said_where_nothing_can_be_matched(room):
    frame = stereo_frame(room, room.walk(240, seed=0)[40])
    noise = np.random.default_rng(0).integers(0, 256, frame.image.shape, np.uint8)
    px = corners(frame.image)
    for pixels in (np.full_like(frame.image, 128), noise, frame.image):  # the last: no disparity
        view = view_of(replace(frame, right=replace(frame.right, image=pixels)))
        assert (view.depth_at(px) > 0).mean() < 0.02
    assert (view_of(frame).depth_at(px + 1000.0) == 0).all()
    assert len(view_of(frame).depth_at(np.zeros((0, 2)))) == 0


def test_noise_of_inverse_depth_is_that_of_a_disparity(room):
    view = view_of(stereo_frame(room, room.walk(240, seed=0)[40]))
    assert view.inv_depth_noise == pytest.approx(
        TrackingConfig().stereo_noise_px / (CAMERA.fx * BASELINE_M))


def test_rotations_of_camera_info_give_the_pair_back():
    rig = StereoRig(CAMERA, OTHER, MOUNTED)
    (R_left, _), (R_right, P) = (rig.calibration(right=right) for right in (False, True))
    np.testing.assert_allclose(from_rectification(R_left, R_right, -P[0, 3] / P[0, 0]), MOUNTED,
                               atol=1e-12)


# Pairs that are none

@pytest.mark.parametrize(('T_left_right', 'words'), [
    (beside(-0.1), r'to the right of the left one, found it 0\.1 m to its left; swap'),
    (beside(0.0), r'at least 1 mm apart, found a baseline of 0 m; calibrate'),
    (make_transform(np.eye(3), np.array([0.01, 0.1, 0])), r'beside the left one, found it at')])
def test_a_wrong_baseline_gets_a_sentence(room, T_left_right, words):
    frame = stereo_frame(room, room.walk(240, seed=0)[40])
    with pytest.raises(InputError, match=words):
        view_of(replace(frame, right=replace(frame.right, T_left_right=T_left_right)))


def test_images_of_two_sizes_get_a_sentence(room):
    frame = stereo_frame(room, room.walk(240, seed=0)[40])
    small = replace(frame.right, image=frame.right.image[::2, ::2])
    with pytest.raises(InputError, match=r'images of one size, found 240x180 beside 480x360'):
        view_of(replace(frame, right=small))


# Bundle adjustment

def test_a_shift_of_all_inverse_depths_is_found_with_the_scene():
    """A moving camera tells what one pair cannot: disparities that are all off by the same."""
    rng = np.random.default_rng(5)
    points = rng.uniform((-6, -3, 4), (6, 3, 30), (250, 3))
    T = np.stack([make_transform(so3_exp(np.array([0, 0.02 * k, 0])), np.array([0.3 * k, 0, k]))
                  for k in range(6)])
    cams = np.stack([points @ T_k[:3, :3].T + T_k[:3, 3] for T_k in inverse(T)])
    pose, point = (index.ravel() for index in np.mgrid[:6, :250])
    seen = cams[pose, point]
    shift, noise = 0.004, 0.001
    problem = BundleProblem(
        T, points, np.arange(6) < 1, pose, point, seen[:, :2] / seen[:, 2:],
        1 / seen[:, 2] + shift, np.ones(len(pose)), 700.0, np.full(len(pose), noise),
        calibration=('shift',), shifted=True)
    result = bundle_adjust(problem, 40)
    assert result.inv_depth_shift == pytest.approx(shift, rel=0.02)
    np.testing.assert_allclose(result.T_map_cam, T, atol=0.01)
    stays = bundle_adjust(replace(problem, calibration=()), 40)
    assert np.abs(stays.T_map_cam[:, :3, 3] - T[:, :3, 3]).max() > 0.05


# Maps

def test_a_stereo_map_is_in_metres_from_the_first_image_on(walk, encoder):
    _, estimates, scene = mapped(walk, encoder)
    assert all(estimate.status.has_pose for estimate in estimates)
    assert (scene.metres_per_unit, scene.scale_source) == (1.0, 'stereo')
    assert ate(scene, walk).rmse < 0.015
    assert ate(scene, walk, 'sim3').scale == pytest.approx(1, abs=0.015)
    assert len(scene.cloud) > 200


def test_a_turned_camera_of_the_pair_does_not_spoil_the_scale(room, walk, encoder):
    """The calibration says parallel: without the refined shift the scale is off by far more."""
    frames = [replace(f, right=replace(
        right_image(room, CAMERA, f.T_map_cam, BASELINE_M, T_left_right=TURNED),
        T_left_right=beside(BASELINE_M))) for f in walk]
    _, _, scene = mapped(frames, encoder)
    assert ate(scene, frames, 'sim3').scale == pytest.approx(1, abs=0.03)


def test_without_right_images_the_camera_goes_on_in_the_metric_map(walk, encoder):
    gone = [replace(f, right=None) if i > 8 else f for i, f in enumerate(walk)]
    _, estimates, scene = mapped(gone, encoder)
    assert all(estimate.status.has_pose for estimate in estimates)
    assert scene.scale_source == 'stereo'
    assert ate(scene, walk).rmse < 0.03


def test_right_images_that_come_too_late_are_told(walk, encoder, caplog):
    alone = [replace(f, right=None) if i < 15 else f for i, f in enumerate(walk)]
    _, _, scene = mapped(alone, encoder)
    assert scene.scale_source == 'unknown'
    assert 'has a right image, but the map began without' in caplog.text


def test_depth_images_are_preferred(room, walk, encoder):
    frames = [replace(f, depth=room.render(CAMERA, f.T_map_cam)[1]) for f in walk[:2]]
    assert view_of(frames[0]).stereo is None
    assert mapped(frames, encoder)[2].scale_source == 'depth'


def test_each_keyframe_keeps_the_noise_of_its_sensor_also_in_a_saved_map(walk, encoder):
    _, _, scene = mapped(walk[:6], encoder)
    noise = TrackingConfig().stereo_noise_px / (CAMERA.fx * BASELINE_M)
    map_ = scene.graph.restored(MapperConfig())
    map_.keyframes[0].inv_depth_noise = None  # as if it had come with a depth image
    count = np.arange(len(map_))
    problem, rows, _ = bundle_problem(map_, MapperConfig(), count[1:], count[:1],
                                      np.arange(len(map_.landmarks)))
    from_image = map_.landmarks.seen_keyframe[rows] == 0
    assert from_image.any() and not from_image.all()
    np.testing.assert_allclose(problem.depth_noise, np.where(
        from_image, TrackingConfig().depth_noise, noise))
    # What is left of the calibration error of this session's pair is none of an earlier pair.
    before = map_.landmarks.seen_inv_depth.copy()
    shift_inv_depth(map_, 0.01)
    np.testing.assert_array_equal(map_.landmarks.seen_inv_depth, before)


# Readers

def written(folder, frames, right='right'):
    for side, images in (('left', [f.image for f in frames]),
                         (right, [f.right.image for f in frames])):
        (folder / side).mkdir(parents=True)
        for index, image in enumerate(images):
            cv2.imwrite(str(folder / side / f'{index:03d}.png'), image[..., ::-1])
    return folder


def calibration_yaml(camera, R, P):
    def matrix(values):
        return {'data': [float(value) for value in np.ravel(values)]}

    return json.dumps({
        'image_width': camera.width, 'image_height': camera.height, 'camera_name': 'x',
        'distortion_model': 'plumb_bob', 'camera_matrix': matrix(camera.K),
        'distortion_coefficients': matrix(camera.distortion or np.zeros(5)),
        'rectification_matrix': matrix(R), 'projection_matrix': matrix(P)})


def same_pair(frame, other):
    np.testing.assert_array_equal(frame.image, other.image)
    np.testing.assert_array_equal(frame.right.image, other.right.image)
    np.testing.assert_allclose(frame.right.T_left_right, other.right.T_left_right, atol=1e-9)
    assert (frame.camera, frame.right.camera) == (other.camera, other.right.camera)


def test_folders_left_and_right_with_two_calibrations(tmp_path, room):
    frames = [stereo_frame(room, pose, right=OTHER, T_left_right=MOUNTED)
              for pose in room.walk(240, seed=0)[:2]]
    folder = written(tmp_path / 'pairs', frames)
    rig = StereoRig(CAMERA, OTHER, MOUNTED)
    for side, camera in (('left', CAMERA), ('right', OTHER)):
        (folder / f'{side}.yaml').write_text(
            calibration_yaml(camera, *rig.calibration(right=side == 'right')))
    source = open_source(folder)
    assert source.has_right and 'right images' in source.describe()
    for frame, original in zip(source, frames, strict=True):
        same_pair(frame, original)
    alone = open_source(folder, SourceOptions(use_stereo=False, fx=300))
    assert not alone.has_right
    assert next(iter(alone)).right is None


def test_folders_of_rectified_images_with_a_baseline(tmp_path, walk):
    folder = written(tmp_path / 'pairs', walk[:2])
    camera = {'fx': CAMERA.fx, 'cx': CAMERA.cx, 'cy': CAMERA.cy}
    same_pair(next(iter(open_source(folder, SourceOptions(**camera, baseline_m=BASELINE_M)))),
              walk[0])
    with pytest.raises(InputError, match=r'left\.yaml and right\.yaml .* or --fx and --baseline'):
        open_source(folder)
    (folder / 'right' / '000.png').rename(folder / 'right' / 'x.png')
    frames = list(open_source(folder, SourceOptions(**camera, baseline_m=BASELINE_M)))
    assert [f.right is None for f in frames] == [True, False]


def test_a_set_with_two_cameras_and_its_baseline(tmp_path, walk):
    folder = written(tmp_path / 'pairs', walk[:3])
    entries = [{'file': f'{side}/{i:03d}.png', 'timestamp': i / 10, 'K': CAMERA.K.tolist(),
                'camera': side} for side in ('left', 'right') for i in range(3)]
    path = folder / 'cameras.json'
    path.write_text(json.dumps({'frames': entries[:-1], 'stereo_baseline_m': BASELINE_M}))
    frames = list(open_source(folder))
    same_pair(frames[0], walk[0])
    assert [f.right is not None for f in frames] == [True, True, False]
    path.write_text(json.dumps({'frames': entries, 'T_left_right': MOUNTED.tolist()}))
    np.testing.assert_allclose(next(iter(open_source(folder))).right.T_left_right, MOUNTED)
    path.write_text(json.dumps({'frames': entries}))
    assert not open_source(folder).has_right
    path.write_text(json.dumps({'frames': entries, 'stereo_baseline_m': 'wide'}))
    with pytest.raises(InputError, match='expected stereo_baseline_m in metres'):
        open_source(folder)


@pytest.mark.parametrize('topics', [BagTopics(), BagTopics(
    '/rig/left/image_raw', '/rig/left/camera_info', right='/rig/right/image_raw',
    right_info='/rig/right/camera_info')])
def test_a_bag_gives_pairs_back(tmp_path, room, topics):
    pytest.importorskip('rosbags', reason='bags need the extra [bag]')
    frames = [stereo_frame(room, pose, index, right=OTHER, T_left_right=MOUNTED)
              for index, pose in enumerate(room.walk(240, seed=0)[:3])]
    frames[1] = replace(frames[1], right=None)
    write_bag(tmp_path / 'bag', frames, topics=topics)
    source = open_source(tmp_path / 'bag', SourceOptions(
        image_topic=topics.image if 'left' not in topics.image else ''))
    assert source.has_right
    for frame, original in zip(source, frames, strict=True):
        if original.right is None:
            assert frame.right is None
        else:
            same_pair(frame, original)


def test_a_bag_with_the_cameras_swapped_is_told(tmp_path, walk):
    pytest.importorskip('rosbags', reason='bags need the extra [bag]')
    write_bag(tmp_path / 'bag', walk[:2], topics=BagTopics(
        '/right/image_raw', '/right/camera_info', right='/left/image_raw',
        right_info='/left/camera_info'))
    with pytest.raises(InputError, match=r'found a baseline of 0 m; .*--mono'):
        open_source(tmp_path / 'bag')
