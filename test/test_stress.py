"""Hard images: light that jumps, blur, fast turns, things that move, a start without parallax."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import InputError
from feedforward_recon.evaluation import distances_by_consensus
from feedforward_recon.geometry.pnp import refine_pose
from feedforward_recon.geometry.transforms import inverse, se3_exp, so3_exp, transform_points
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.tracking import elected
from feedforward_recon.synthetic.render import rasterise
from feedforward_recon.synthetic.room import box_faces
from feedforward_recon.synthetic.stress import CAMERA, CASES, STEPS, stress_walk
from feedforward_recon.types import Status, Trajectory

FALSE_M = 0.2


def errors(estimates, frames):
    """Of each pose (metres), from the truth of the first frame on; NaN without a pose."""
    T_world_map = frames[0].T_map_cam @ inverse(estimates[0].T_map_cam)
    return np.array([np.nan if e.T_map_cam is None else
                     np.linalg.norm((T_world_map @ e.T_map_cam - f.T_map_cam)[:3, 3])
                     for e, f in zip(estimates, frames, strict=True)])


def lit(frame, gain, gamma):
    bright = 255 * gain * (frame.image / 255.0)**gamma
    return replace(frame, image=np.clip(np.rint(bright), 0, 255).astype(np.uint8))


def test_no_false_pose_in_fast_blurred_turns_while_the_exposure_jumps(room_walk, encoder):
    # Every third image of 10 Hz, smeared along the row; the light jumps by a factor of 3.
    frames = [replace(lit(frame, (1.0, 0.33)[i // 5 % 2], (1.0, 1.2)[i // 5 % 2]),
                      stamp_ns=frame.stamp_ns // 3) for i, frame in enumerate(room_walk[::3])]
    frames = [replace(f, image=cv2.blur(f.image, (7, 1))) for f in frames]
    mapper = Mapper(MapperConfig(), encoder)
    estimates = [mapper.process(frame) for frame in frames]
    off = errors(estimates, frames)
    sure = np.array([e.status is Status.TRACKING for e in estimates])
    assert not (sure & ~(off < FALSE_M)).any()
    assert np.isfinite(off).mean() > 0.9


def test_a_jump_of_the_exposure_does_not_lose_the_camera(room_walk, encoder):
    frames = [lit(frame, 0.3 if 8 <= i < 16 else 1.0, 1.0)
              for i, frame in enumerate(room_walk[:20])]
    # Anywhere in the map it could not be found: it is found where it should be.
    config = MapperConfig()
    config = replace(config, tracking=replace(config.tracking, relocalise_inliers=1000))
    mapper = Mapper(config, encoder)
    estimates = [mapper.process(frame) for frame in frames]
    assert all(e.status.has_pose for e in estimates)
    assert errors(estimates, frames).max() < 0.03


def test_a_monocular_map_settles_again_after_few_landmarks_held_the_camera(room_walk, encoder):
    mapper = Mapper(MapperConfig(), encoder)
    estimates = []
    for index, frame in enumerate(room_walk):
        image = frame.image
        if 40 <= index < 42:
            image = image.copy()
            image[:, :282] = 128
        estimates.append(mapper.process(replace(frame, image=image, depth=None)))
    assert estimates[0].status is Status.UNCERTAIN
    keyframes = sum(e.is_keyframe for e in estimates[:40])
    assert estimates[39].status is Status.TRACKING and keyframes < 12
    assert 20 <= estimates[41].inliers < 40
    again = [e for e in estimates[42:] if e.status.has_pose and e.inliers > 100]
    assert again and again[0].status is Status.UNCERTAIN
    assert again[-1].status is Status.TRACKING


@pytest.mark.parametrize('depth', [True, False])
def test_few_old_tracks_bring_a_lost_camera_back_with_depth_alone(room_walk, encoder, depth):
    frames = [f if depth else replace(f, depth=None) for f in room_walk[:44]]
    config = MapperConfig()  # no place is found by so many
    config = replace(config, tracking=replace(config.tracking, relocalise_inliers=1000))
    mapper = Mapper(config, encoder)
    for frame in frames[:42]:
        mapper.process(frame)
    mapper.process(replace(frames[42], image=np.zeros_like(frames[42].image)))
    strip = frames[43].image.copy()
    strip[:, :240] = 128
    estimate = mapper.process(replace(frames[43], image=strip))
    assert estimate.status.has_pose == depth


def test_a_camera_that_turns_in_place_has_no_map_until_it_moves(room_walk, encoder):
    # Turning about its centre moves an image as a homography does.
    first, camera = room_walk[0], room_walk[0].camera
    K = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]])
    turned = [replace(first, depth=None, stamp_ns=first.stamp_ns + 100_000_000 * i,
                      image=cv2.warpPerspective(
                          first.image, K @ so3_exp(np.array([0, np.deg2rad(1.2 * i), 0]))
                          @ np.linalg.inv(K), camera.size_wh, borderMode=cv2.BORDER_REPLICATE))
              for i in [*range(11), *range(9, -1, -1)]]
    turned = [replace(f, stamp_ns=100_000_000 * i) for i, f in enumerate(turned)]
    mapper = Mapper(MapperConfig(), encoder)
    for index, frame in enumerate(turned):
        estimate = mapper.process(frame)
        assert estimate.status is Status.INITIALISING or index == 0 or estimate.is_keyframe
        assert mapper.source.waiting_for(mapper._map)
    for index, frame in enumerate(room_walk[1:30]):
        mapper.process(replace(frame, depth=None, stamp_ns=10**8 * (len(turned) + index)))
    assert not mapper.source.waiting_for(mapper._map)


@pytest.mark.parametrize('depth', [False, True], ids=['monocular', 'depth'])
def test_a_map_that_was_hardly_begun_is_given_up_unless_it_is_metric(room_walk, encoder, depth):
    # The mirror image of a walk is a walk through another room.
    walks = (room_walk[:10], [replace(f, image=np.ascontiguousarray(f.image[:, ::-1]),
                                      depth=np.ascontiguousarray(f.depth[:, ::-1]))
                              for f in room_walk[30:52]])
    mapper, stamp_ns = Mapper(MapperConfig(), encoder), 0
    begun = [False, False]
    for place, frames in enumerate(walks):
        for frame in frames:
            stamp_ns += 10**8
            mapper.process(replace(frame, stamp_ns=stamp_ns, depth=frame.depth if depth else None))
            begun[place] |= not mapper.source.waiting_for(mapper._map)
            if place == 0 and begun[0]:
                break  # as soon as the map has begun
    assert begun == [True, True] and mapper.stats.lost > 0
    assert mapper.stats.restarts == (0 if depth else 1)
    assert (mapper.results.estimates[0].T_map_cam is None) != depth


def a_view(points, T_map_cam):
    """A view, and where it shows points [N, 3] of the map."""
    gray = np.zeros((CAMERA.height, CAMERA.width), np.uint8)
    view = View(9, 9, np.zeros((*gray.shape, 3), np.uint8), gray, CAMERA, None, 1.0)
    return view, CAMERA.project(transform_points(inverse(T_map_cam), points))


@pytest.mark.parametrize('standing', [40, 80])
def test_what_stands_still_decides_the_pose_although_more_moves(standing):
    rng, moving = np.random.default_rng(0), 100
    points = rng.uniform((-1, -0.8, 2), (1, 0.8, 4), (standing + moving, 3))
    config = MapperConfig()
    map_ = GrowingMap(config, 4)
    map_.T_map_cam = np.eye(4)[None]
    ids = map_.landmarks.add(0, points, np.zeros((len(points), 4), np.float32),
                             np.zeros((len(points), 3), np.uint8))
    for keyframe in range(4):  # what moves is new in the last keyframe
        seen = ids if keyframe == 3 else ids[:standing]
        nothing = np.zeros((len(seen), 2))
        map_.landmarks.observe(seen, keyframe, nothing, nothing, nothing[:, 0], 1.0)
    truth = se3_exp(np.array([0.02, 0, 0, 0, 0.01, 0]))
    moved = points + np.where(np.arange(len(points)) < standing, 0, 0.3)[:, None] * [1, 0, 0]
    view, px = a_view(moved, truth)
    tracks = Tracks(view.gray, ids, px)
    by_number = refine_pose(truth @ se3_exp(np.array([-0.3, 0, 0, 0, 0, 0])), points, px, CAMERA,
                            outlier_px=config.tracking.outlier_px)
    assert by_number.count >= moving  # the wrong pose has more followers
    votes = map_.landmarks.views()[ids] - 1
    election = elected(view, map_, tracks, votes, by_number, config.tracking)
    assert np.allclose(election.winner.T_map_cam, truth, atol=1e-3)
    assert election.is_clear and election.others[standing:].all()
    assert not election.others[:standing].any()


def test_a_false_stretch_does_not_pull_the_alignment():
    rng = np.random.default_rng(0)
    positions = np.cumsum(rng.normal(0, 0.1, (60, 3)), 0)
    poses = np.tile(np.eye(4), (60, 1, 1))
    poses[:, :3, 3] = positions
    truth = Trajectory(np.arange(60) * 10**8, poses)
    wrong = poses.copy()
    wrong[35:, :3, 3] += (1.0, 0, 0)
    wrong[50, 0, 3] = np.nan
    found = Trajectory(truth.stamps_ns, wrong).transformed(se3_exp(np.arange(6) / 3.0), 0.5)
    _, distance = distances_by_consensus(found, truth, with_scale=True, tolerance=0.1)
    assert distance[:35].max() < 1e-9
    assert np.isnan(distance[50])
    assert np.allclose(np.delete(distance, 50)[35:], 1.0)


def test_a_walk_that_starts_by_turning_stays_in_its_place():
    plan = CASES['pure_rotation_start'](np.random.default_rng(0), np.random.default_rng(1), 40)
    still = plan.poses[:10 * STEPS]
    assert np.ptp(still[:, :3, 3], axis=0).max() == 0
    assert np.linalg.norm(np.diff(plan.poses[10 * STEPS:, :3, 3], axis=0), axis=1).sum() > 0.3
    forward = still[:, :3, 2]
    assert (forward @ forward[0]).min() < np.cos(np.deg2rad(30))


def test_moving_boxes_cover_much_of_the_image():
    images = 160
    plan = CASES['moving_boxes'](np.random.default_rng(0), np.random.default_rng(1), images)
    covered = []
    for index in range(0, images, 8):
        faces = box_faces(np.random.default_rng(0), plan.intruders(index))
        nearest, *_ = rasterise([face.surface for face in faces], CAMERA,
                                plan.poses[index * STEPS])
        covered.append((nearest >= 0).mean())
    assert covered[0] < 0.15  # the map starts with what stands still
    assert np.mean(np.array(covered) > 0.3) > 0.4


def test_unknown_cases_are_refused():
    with pytest.raises(InputError, match='expected a case of plain'):
        stress_walk('earthquake', 0)
