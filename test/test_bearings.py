"""What was seen once holds the next pose, and says nothing of how far the camera went."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.bearings import Bearings, across
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import refine_pose
from feedforward_recon.geometry.transforms import (
    inverse,
    pose_error,
    se3_exp,
    so3_exp,
    transform_points,
)
from feedforward_recon.mapping import tracking
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.landmarks import LandmarkTable
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.tracking import Tracker, fit_pose

CAMERA = Camera(320, 240, 237.0, 237.0, 159.5, 119.5)


def bearings_to(points, T_map_cam, inv_depth, first=None):
    """Bearings of a camera at ``first`` to points [N, 3], as a camera at T_map_cam sees them."""
    first = np.eye(4) if first is None else first
    local = transform_points(inverse(first), points).T
    target = transform_points(inverse(T_map_cam), points).T
    directions = first[:3, :3] @ (local / local[2])
    origins = np.repeat(first[:3, 3:], len(points), axis=1)
    return Bearings(origins, directions, target[:2] / target[2], inv_depth)


def in_view(rng, count, left=0.0):
    """Points [count, 3] in front of the identity, on the image from ``left`` [pixels] on."""
    px = rng.uniform((left, 0), (320, 240), (count, 2))
    return CAMERA.unproject(px, rng.uniform(2, 6, count))


def test_whitened_rows_have_the_noise_of_a_pixel():
    slide = np.random.default_rng(0).normal(0, 3, (2, 50))
    W = across(np.broadcast_to(np.eye(2)[..., None], (2, 2, 50)), slide)  # W[i] = whitened e_i
    noise = np.eye(2)[..., None] + slide[:, None] * slide
    assert np.allclose(np.einsum('ijm,jkm,lkm->ilm', W, noise, W), np.eye(2)[..., None])


def test_the_slide_is_what_a_change_of_the_depth_does_to_the_image():
    rng = np.random.default_rng(1)
    T = se3_exp(np.array([0.1, -0.2, 0.15, 0.02, 0.05, -0.03]))
    bearings = bearings_to(in_view(rng, 20), T, 0.3)
    p, slide, front = bearings.seen_from(inverse(T))
    step = 1e-6
    q, _, _ = Bearings(bearings.origins, bearings.directions, bearings.target, 0.3 * (1 + step)
                   ).seen_from(inverse(T))
    assert front.all() and np.allclose((q[:2] / q[2] - p[:2] / p[2]) / step, slide, atol=1e-5)


@pytest.mark.parametrize('inv_depth', [0.05, 0.25, 2.0])
def test_a_turn_on_the_spot_is_found_whatever_the_depth(inv_depth):
    rng = np.random.default_rng(2)
    truth = np.eye(4)
    truth[:3, :3] = so3_exp(np.array([0.01, 0.04, -0.02]))
    near = in_view(rng, 20)
    px = CAMERA.project(transform_points(inverse(truth), near))
    fit = refine_pose(np.eye(4), near, px, CAMERA,
                      bearings=bearings_to(in_view(rng, 100), truth, inv_depth))
    assert max(pose_error(fit.T_map_cam, truth)) < 1e-4


def test_bearings_hold_the_turn_where_points_lie_in_a_strip():
    """Points of about one depth, each 5 % off: there a way sidewards looks like a turn."""
    alone, held = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = se3_exp(np.array([0.15, 0, 0, 0, 0.02, 0]))
        strip = CAMERA.unproject(rng.uniform((20, 0), (60, 240), (30, 2)), rng.uniform(3, 4, 30))
        px = CAMERA.project(transform_points(inverse(truth), strip)) + rng.normal(0, 0.3, (30, 2))
        wrong = strip * (1 + 0.05 * rng.standard_normal((30, 1)))
        bearings = bearings_to(in_view(rng, 100, left=80), truth, 0.25)
        for errors, more in ((alone, None), (held, bearings)):
            errors.append(pose_error(refine_pose(np.eye(4), wrong, px, CAMERA, bearings=more
                                                 ).T_map_cam, truth))
    assert (np.median(held, 0) < 0.5 * np.median(alone, 0)).all()


def test_bearings_do_not_shorten_the_way_that_points_tell():
    rng = np.random.default_rng(3)
    truth = se3_exp(np.array([0.3, 0.05, 0.1, 0, 0.02, 0]))
    points = in_view(rng, 60)
    px = CAMERA.project(transform_points(inverse(truth), points))
    more = bearings_to(in_view(rng, 100), truth, 0.25)
    fit = refine_pose(np.eye(4), points, px, CAMERA, bearings=more)
    distance, angle_deg = pose_error(fit.T_map_cam, truth)
    assert distance < 0.01 and angle_deg < 0.1


def test_a_bearing_from_behind_the_camera_has_no_say():
    truth = se3_exp(np.array([0, 0, 0, 0, 3.0, 0]))
    points = transform_points(truth, in_view(np.random.default_rng(4), 40))
    px = CAMERA.project(transform_points(inverse(truth), points))
    ahead = bearings_to(in_view(np.random.default_rng(5), 30), np.eye(4), 0.25)
    fit = refine_pose(truth @ se3_exp(np.full(6, 0.01)), points, px, CAMERA, bearings=ahead)
    assert max(pose_error(fit.T_map_cam, truth)) < 1e-6


def test_a_landmark_is_first_seen_where_its_oldest_observation_is():
    table = LandmarkTable(4)
    ids = table.add(1, np.full((3, 3), np.nan), np.zeros((3, 4), np.float32),
                    np.zeros((3, 3), np.uint8))
    T_map_cam = np.stack([se3_exp(np.full(6, 0.1 * k)) for k in range(4)])
    for keyframe, seen in ((1, [2, 0]), (2, [1, 0]), (3, [0, 1, 2])):
        xy = 10.0 * keyframe + np.array(seen)[:, None] * [1, 1]
        table.observe(ids[seen], keyframe, xy, xy, np.zeros(len(seen)), 1.0)
    T, xy = table.first_seen(ids[[2, 0, 1]], T_map_cam)
    assert np.allclose(np.moveaxis(T, -1, 0), T_map_cam[[1, 1, 2]])
    assert xy[0].tolist() == [12.0, 10.0, 21.0]


def tracked(seed, pending, depth=None, others_from=None):
    """Errors of a pose tracked on 30 landmarks in a strip, and ``pending`` ones elsewhere.

    others_from: the pose from which those elsewhere are seen, as if they had moved.
    """
    rng = np.random.default_rng(seed)
    truth = se3_exp(np.array([0.15, 0, 0, 0, 0.02, 0]))
    strip = CAMERA.unproject(rng.uniform((20, 0), (60, 240), (30, 2)), rng.uniform(3, 4, 30))
    others = in_view(np.random.default_rng(100 + seed), 100, left=80)[:pending]
    points = np.concatenate([strip, others])
    known = strip * (1 + 0.05 * rng.standard_normal((30, 1)))
    map_ = GrowingMap(MapperConfig(), 4)
    map_.T_map_cam = np.eye(4)[None]
    ids = map_.landmarks.add(0, np.concatenate([known, np.full_like(others, np.nan)]),
                             np.zeros((len(points), 4), np.float32),
                             np.zeros((len(points), 3), np.uint8))
    px = CAMERA.project(points)
    map_.landmarks.observe(ids, 0, px, CAMERA.normalise(px), np.zeros(len(px)), 1.0)
    gray = np.zeros((240, 320), np.uint8)
    view = View(1, 1, np.zeros((240, 320, 3), np.uint8), gray, CAMERA, depth, 1.0)
    tracker = Tracker(MapperConfig().tracking)
    tracker.tracks = Tracks(gray, ids, px)
    now = CAMERA.project(transform_points(inverse(truth), points))
    if others_from is not None:
        now[30:] = CAMERA.project(transform_points(inverse(others_from), others))
    tracker.flow = lambda *args: Tracks(gray, ids, now)
    found = tracker.track(view, map_)
    assert len(found.tracks.ids) == found.fit.count + pending
    return pose_error(found.fit.T_map_cam, truth)


def test_tracks_without_a_point_hold_a_tracked_camera():
    held, alone = ([tracked(seed, pending) for seed in range(10)] for pending in (100, 0))
    assert (np.median(held, 0) < 0.5 * np.median(alone, 0)).all()


def test_what_moves_does_not_take_a_camera_away_from_its_landmarks(monkeypatch):
    moved = se3_exp(np.array([0.15, 0, 0, 0, 0.05, 0]))  # 7 pixels beside
    distance, angle_deg = np.subtract(tracked(0, 100, others_from=moved), tracked(0, 0))
    assert distance < 0.005 and angle_deg < 0.1

    def losing(*args, bearings=None, **options):
        fit = fit_pose(*args, bearings=bearings, **options)
        few = np.arange(len(fit.inliers)) < 5
        return fit if bearings is None else replace(fit, inliers=few)

    monkeypatch.setattr(tracking, 'fit_pose', losing)  # a pose that most landmarks contradict
    assert tracked(0, 100) == tracked(0, 0)


def test_a_few_of_them_or_a_sensor_leave_the_pose_to_the_landmarks():
    assert tracked(0, 5) == tracked(0, 0)
    flat = np.full((240, 320), 3.5, np.float32)
    assert tracked(0, 100, flat) == tracked(0, 0, flat)
