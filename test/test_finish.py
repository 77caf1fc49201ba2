"""The last look at a finished map: what the lens is, what sees what, and every pose once more."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from open_map import open_map
from small_config import SMALL

from feedforward_recon.config.schema import MapperConfig, TrackingConfig
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp, transform_points
from feedforward_recon.mapping import backlog, frame_tracks
from feedforward_recon.mapping.adjustment import bundle_problem, calibrate_depth, refine_all
from feedforward_recon.mapping.association import associate_again
from feedforward_recon.mapping.estimates import EstimateHistory
from feedforward_recon.mapping.frame_tracks import FrameTracks
from feedforward_recon.mapping.map import GUIDED_RADIUS_PX
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.offline import map_frames
from feedforward_recon.types import Estimate, Status, Trajectory

K1 = -0.12


@pytest.fixture(scope='module')
def frames(room_walk):
    return room_walk[:60]


@pytest.fixture(scope='module')
def bent(frames):
    """The walk through a lens that bends, whose camera says that it does not."""
    camera = frames[0].camera
    lens = replace(camera, distortion=(K1, 0.0, 0.0, 0.0))
    pixels = np.stack(np.meshgrid(np.arange(camera.width), np.arange(camera.height)), -1)
    xy = lens.normalise(pixels.reshape(-1, 2))
    straight = camera.project(np.concatenate([xy, np.ones((len(xy), 1))], 1))
    u, v = straight.reshape(*pixels.shape[:2], 2).astype(np.float32).transpose(2, 0, 1)
    return [replace(f, image=cv2.remap(f.image, u, v, cv2.INTER_LINEAR),
                    depth=cv2.remap(f.depth, u, v, cv2.INTER_NEAREST)) for f in frames]


def truth(frames):
    return Trajectory(np.array([f.stamp_ns for f in frames]),
                      np.stack([f.T_map_cam for f in frames]))


def mapper_of(frames, encoder, depth=True, config=None, source=None):
    mapper = Mapper(config or MapperConfig(), encoder, source=source)
    for frame in frames:
        mapper.process(frame if depth else replace(frame, depth=None))
    return mapper


def open_map_of(frames, encoder):
    """A map with depth that is held by the test, and its mapper."""
    map_, start = open_map(MapperConfig(), encoder, frames[0].camera)
    mapper = Mapper(MapperConfig(), encoder, start=start)
    for frame in frames:
        mapper.process(frame)
    return map_, mapper


# The lens

@pytest.mark.parametrize('depth', [True, False], ids=['depth', 'monocular'])
def test_distortion_that_nobody_told_is_found(bent, encoder, depth):
    mapper = mapper_of(bent, encoder, depth)
    # Roughly while driving, by the refinements of the whole map; closer in the end.
    assert mapper.results.camera.distortion[0] == pytest.approx(K1, abs=0.5 * abs(K1))
    scene = mapper.finish()
    assert mapper.results.camera.distortion[0] == pytest.approx(K1, abs=0.02)
    error = absolute_trajectory_error(scene.trajectory, truth(bent), 'se3' if depth else 'sim3')
    told = replace(bent[0].camera, distortion=(1e-9, 0.0, 0.0, 0.0))  # it counts as calibrated
    held = mapper_of([replace(f, camera=told) for f in bent], encoder, depth)
    wrong = absolute_trajectory_error(held.finish().trajectory, truth(bent),
                                      'se3' if depth else 'sim3')
    assert held.results.camera == told
    assert error.rmse < 0.6 * wrong.rmse
    assert error.rotation_median_deg < 0.6 * wrong.rotation_median_deg


def test_a_lens_that_does_not_bend_stays_straight(frames, encoder):
    mapper = mapper_of(frames, encoder, depth=False)
    mapper.finish()
    camera = mapper.results.camera
    assert abs(camera.distortion[0]) < 0.006
    assert (camera.fx, camera.cx) == (frames[0].camera.fx, frames[0].camera.cx)


def test_given_poses_tell_the_lens_and_stay(bent, encoder):
    mapper = mapper_of(bent, encoder, source=GivenPoses(MapperConfig(), encoder))
    scene = mapper.finish()
    assert mapper.results.camera.distortion[0] == pytest.approx(K1, abs=0.02)
    np.testing.assert_allclose(scene.trajectory.T_map_cam, truth(bent).T_map_cam, atol=1e-12)


def test_what_was_seen_lies_where_the_new_lens_says(bent, encoder):
    """Pixels stay; rays, sensor points and the cloud follow the camera."""
    map_, _ = open_map_of(bent[:30], encoder)
    table, camera = map_.landmarks, map_.keyframes[-1].camera
    refine_all(map_, map_.config, calibration=('radial',))
    new = map_.keyframes[-1].camera
    assert new != camera and all(k.camera == new for k in map_.keyframes)
    np.testing.assert_allclose(table.seen_xy, new.normalise(table.seen_px), atol=1e-6)
    for keyframe in map_.keyframes:
        known = np.isfinite(keyframe.points_cam[:, 2])
        np.testing.assert_allclose(new.project(keyframe.points_cam[known]),
                                   keyframe.features.keypoints[known], atol=0.05)
        px = new.project(keyframe.cloud_cam)
        np.testing.assert_allclose(px, np.rint(px), atol=0.15)  # where depth was sampled


def test_later_images_of_the_camera_are_seen_through_the_refined_lens(bent, encoder, tmp_path):
    saved = map_frames(bent[::2], SMALL, encoder).save(tmp_path / 'map')
    localizer = saved.localizer()
    camera = localizer.camera_of(bent[1])
    assert camera.distortion[0] == pytest.approx(K1, abs=0.03)
    calibrated = replace(bent[1].camera, distortion=(-0.3, 0.0, 0.0, 0.0))
    assert localizer.camera_of(replace(bent[1], camera=calibrated)) == calibrated
    another = replace(bent[1].camera, fx=500.0)
    assert localizer.camera_of(replace(bent[1], camera=another)) == another
    # A later session begins with it as well.
    run = map_frames([replace(f, stamp_ns=f.stamp_ns + 10**12) for f in bent[1:8:2]], SMALL,
                     encoder, into=load_map(tmp_path / 'map'))
    assert run.scene.keyframes[-1].camera.distortion[0] == pytest.approx(K1, abs=0.03)


def test_the_lens_of_one_camera_is_not_refined_with_what_another_saw(frames, bent, encoder,
                                                                     tmp_path):
    """A later session has another camera: the lens of the first stays, and so does its own."""
    first = map_frames(frames[:20], SMALL, encoder)
    kept = first.scene.keyframes[-1].camera
    size_wh = (480, 360)
    other = bent[0].camera.resized(size_wh)
    later = [replace(f, stamp_ns=f.stamp_ns + 10**12, camera=other,
                     image=cv2.resize(f.image, size_wh), depth=cv2.resize(
                         f.depth, size_wh, interpolation=cv2.INTER_NEAREST))
             for f in bent[:24:2]]
    run = map_frames(later, SMALL, encoder, into=first.save(tmp_path / 'map'))
    cameras = {keyframe.camera for keyframe in run.scene.keyframes}
    assert cameras == {kept, other}


# Observations

def test_landmarks_are_found_in_keyframes_before_them(frames, encoder, monkeypatch):
    """Each is observed once, near where it projects to; the map agrees better with itself."""
    monkeypatch.setattr(backlog, 'ROUNDS', ())  # nobody looked while driving
    map_, _ = open_map_of(frames, encoder)
    refine_all(map_, map_.config)
    table, before = map_.landmarks, len(map_.landmarks.seen_landmark)
    known, alive = table.has_point.sum(), table.alive.sum()

    def earlier():
        return table.seen_keyframe < table.anchor[table.seen_landmark]

    count = earlier().sum()
    for _ in associate_again(map_):
        pass
    views = len(table.seen_landmark) / table.alive.sum()
    assert views > 1.1 * before / alive and table.has_point.sum() <= known
    pairs = table.seen_landmark.astype(np.int64) << 32 | table.seen_keyframe
    assert len(np.unique(pairs)) == len(pairs)
    assert earlier().sum() > count + 100
    assert np.median(reprojection_px(map_)) < GUIDED_RADIUS_PX / 2


def reprojection_px(map_):
    table = map_.landmarks
    rows = np.flatnonzero(table.has_point[table.seen_landmark])
    points = table.points_map(table.seen_landmark[rows], map_.T_map_cam)
    T = inverse(map_.T_map_cam[table.seen_keyframe[rows]])
    cams = np.matmul(T[:, :3, :3], points[..., None])[..., 0] + T[:, :3, 3]
    return np.linalg.norm(map_.keyframes[0].camera.project(cams) - table.seen_px[rows], axis=1)


# Trust in depth

def with_depth_errors(map_, std, seed=0):
    """The sensor of an open map, made as exact as its landmarks and then off by ``std`` (1/m)."""
    table, rng = map_.landmarks, np.random.default_rng(seed)
    points = table.points_map(table.seen_landmark, map_.T_map_cam)
    T = inverse(map_.T_map_cam[table.seen_keyframe])
    z = np.matmul(T[:, :3, :3], points[..., None])[:, 2, 0] + T[:, 2, 3]
    table.seen_inv_depth[:] = 1 / z + rng.normal(0, std, len(z))


def test_depth_is_trusted_as_far_as_it_agrees_with_the_landmarks(frames, encoder):
    map_, _ = open_map_of(frames, encoder)
    settings, here, refined = TrackingConfig().depth_noise, [], []
    count = np.arange(len(map_))
    for std in (1e-5, 0.002, 0.006, 0.2):
        with_depth_errors(map_, std)
        calibrate_depth(map_)
        problem, *_ = bundle_problem(map_, map_.config, count[1:], count[:1],
                                     np.arange(len(map_.landmarks)))
        here.append(map_.depth_noise)
        refined.append(np.unique(problem.depth_noise).item())
    # Never more than the settings say; errors that are alike count for refining a map.
    assert here == pytest.approx([settings, settings, 0.006, 0.2], rel=0.05)
    assert refined == pytest.approx([settings, 0.016, 0.048, 0.2], rel=0.05)


# Poses between keyframes

def seen_from(T_map_cam, points, camera):
    return camera.project(transform_points(inverse(T_map_cam), points))


def test_poses_between_keyframes_are_fitted_to_the_finished_map(frames, encoder):
    map_, _ = open_map_of(frames[:30], encoder)
    ids = np.flatnonzero(map_.landmarks.has_point)
    points = map_.landmarks.points_map(ids, map_.T_map_cam)
    true = map_.T_map_cam[1] @ se3_exp(np.array([0.02, 0.01, 0, 0, 0.01, 0]))
    off = true @ se3_exp(np.array([0.01, 0, 0.02, 0.004, 0, 0]))
    px = seen_from(true, points, map_.keyframes[0].camera)
    front = np.isfinite(px).all(1)
    history, tracks = EstimateHistory(), FrameTracks()
    history.record(Estimate(1, Status.TRACKING, off), 1, map_.T_map_cam[1])
    history.record(Estimate(2, Status.TRACKING, off), 1, map_.T_map_cam[1])
    gray = frames[0].image[..., 0]
    tracks.record(0, Tracks(gray, ids[front], px[front]))
    tracks.record(1, Tracks(gray, ids[:5], px[:5]))  # too few: the pose stays
    assert tracks.refit(map_, history, TrackingConfig()) == 1
    fitted, stayed = history.pose(0, map_.T_map_cam), history.pose(1, map_.T_map_cam)
    distance, angle = pose_error(fitted[None], true[None])
    assert distance[0] < 1e-4 and angle[0] < 0.01
    np.testing.assert_allclose(stayed, off, atol=1e-12)
    # It moves along with its keyframe afterwards.
    moved = map_.T_map_cam.copy()
    moved[1] = se3_exp(np.array([1.0, 0, 0, 0, 0, 0])) @ moved[1]
    assert history.pose(0, moved)[0, 3] == pytest.approx(fitted[0, 3] + 1)


def test_a_frame_is_not_fitted_to_another_place(frames, encoder):
    """Where much of the view moved by itself, landmarks can agree on a pose that is far off."""
    map_, _ = open_map_of(frames[:10], encoder)
    ids = np.flatnonzero(map_.landmarks.has_point)
    true = map_.T_map_cam[1]
    far = true @ se3_exp(np.array([0.6, 0, 0, 0, 0, 0]))
    px = seen_from(far, map_.landmarks.points_map(ids, map_.T_map_cam), map_.keyframes[0].camera)
    front = np.isfinite(px).all(1)
    history, tracks = EstimateHistory(), FrameTracks()
    history.record(Estimate(1, Status.TRACKING, true), 1, map_.T_map_cam[1])
    tracks.record(0, Tracks(frames[0].image[..., 0], ids[front], px[front]))
    assert tracks.refit(map_, history, TrackingConfig()) == 0
    np.testing.assert_allclose(history.pose(0, map_.T_map_cam), true, atol=1e-12)


def test_frame_tracks_keep_to_their_budget():
    tracks, gray = FrameTracks(budget=1000), np.zeros((4, 4), np.uint8)
    for frame in range(100):
        tracks.record(frame, Tracks(gray, np.arange(90), np.zeros((90, 2))))
        kept = [len(ids) for ids, _ in tracks._seen.values()]
        assert sum(kept) <= 1000 and len(kept) == frame + 1
    assert min(kept) >= 5  # none is emptied while others are full
    assert frame_tracks.BUDGET * 16 < 10_000_000


def test_finishing_leaves_the_map_frame_where_it_was(frames, encoder):
    map_, mapper = open_map_of(frames[:20], encoder)
    first = map_.T_map_cam[0].copy()
    mapper.finish()
    np.testing.assert_array_equal(map_.T_map_cam[0], first)


def test_a_camera_that_is_called_straight_is_told_by_its_focal_length():
    straight = Camera.from_fov(60, (320, 240))
    lens = straight.with_lens(1.0, -0.05)
    said = replace(straight, distortion=(0.0,) * 5)  # as a CameraInfo says it
    assert straight.with_distortion_of(lens) == said.with_distortion_of(lens) == lens
    assert lens.with_distortion_of(straight) == lens  # calibrated: it stays
    assert straight.with_distortion_of(replace(lens, fx=300.0)) == straight
