"""Long walks: loop closure in bounded pieces, and few keyframes in places seen before."""

from dataclasses import replace

import numpy as np
import pytest
from open_map import open_map

from feedforward_recon.config.schema import CloudConfig, MapperConfig
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, se3_exp
from feedforward_recon.mapping import adjustment
from feedforward_recon.mapping.keyframes import CLOUD_FACTOR, KeyframePacker, MapKeyframe
from feedforward_recon.mapping.loop_closure import Loop, close_loop, find_loop
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.types import Features

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 10.0
DRIFT = np.array([0.2, 0.05, 0.1, 0.0, 0.06, 0.0])


@pytest.fixture(scope='module')
def frames(room_walk):
    return room_walk


def mapped(frames, encoder):
    """A mapper after these frames, and its map."""
    map_, start = open_map(MapperConfig(), encoder, CAMERA)
    mapper = Mapper(MapperConfig(), encoder, start=start)
    for frame in frames:
        mapper.process(frame)
    return mapper, map_


def drift(mapper, map_):
    """Let the walk have drifted, more and more; returns the loop that corrects it.

    The landmarks move with their anchors, and the tracker with the newest keyframe.
    """
    true, last = map_.T_map_cam.copy(), len(map_) - 1
    map_.T_map_cam = se3_exp(np.linspace(0, 1, last + 1)[:, None] * DRIFT) @ true
    mapper.source.tracker.map_moved(map_, map_.T_map_cam[last] @ np.linalg.inv(true[last]))
    nothing = np.zeros(0, int)
    return Loop(last, 0, true[last], 1.0, nothing, nothing, 20.0, 10**5), true


def apart(map_, true):
    """Largest distance of keyframes from where they should be, metres."""
    return np.linalg.norm(map_.T_map_cam[:len(true), :3, 3] - true[:, :3, 3], axis=1).max()


def errors_px(map_):
    """Median reprojection error of all observations, pixels."""
    table = map_.landmarks
    rows = np.flatnonzero(table.has_point[table.seen_landmark])
    points = table.points_map(table.seen_landmark[rows], map_.T_map_cam)
    T = inverse(map_.T_map_cam[table.seen_keyframe[rows]])
    p = np.einsum('nij,nj->ni', T[:, :3, :3], points) + T[:, :3, 3]
    xy = p[:, :2] / p[:, 2:]
    return np.median(np.linalg.norm(xy - table.seen_xy[rows], axis=1)) * CAMERA.fx


def test_a_closed_loop_puts_keyframes_and_points_back(frames, encoder):
    mapper, map_ = mapped(frames[:60], encoder)
    loop, true = drift(mapper, map_)
    before_m, pose_graph_px = apart(map_, true), []
    for _ in close_loop(map_, map_.config, loop, with_scale=False,
                        corrected=lambda scale: pose_graph_px.append(errors_px(map_))):
        pass
    assert apart(map_, true) < 0.5 * before_m
    assert np.linalg.norm(map_.T_map_cam[-1, :3, 3] - true[-1, :3, 3]) < 0.1 * before_m
    assert errors_px(map_) < pose_graph_px[0]


@pytest.mark.parametrize('stays', [True, False])
def test_a_loop_rests_on_landmarks_that_several_keyframes_confirmed(frames, encoder, stays):
    _, map_ = mapped(frames[:40], encoder)
    newest, table = len(map_) - 1, map_.landmarks
    table.forget(np.flatnonzero(table.seen_keyframe == newest))  # as if it came back later
    loops = replace(map_.config.loops, min_age=1, candidates=newest)
    config = replace(map_.config, loops=loops)
    if not stays:  # what moves is seen in each place once
        table.forget(np.flatnonzero(table.seen_keyframe != table.anchor[table.seen_landmark]))
    assert (find_loop(map_, config, newest) is not None) == stays


def test_no_piece_of_a_loop_closure_adjusts_more_than_a_window(frames, encoder, monkeypatch):
    """The cost of a piece is bounded by observations, whatever the length of the walk."""
    mapper, map_ = mapped(frames[:60], encoder)
    seen, poses = [], []

    def noted(problem, steps):
        seen.append(len(problem.pose_index))
        poses.append((~problem.fixed).sum())
        return adjust(problem, steps)

    adjust = adjustment.bundle_adjust
    monkeypatch.setattr(adjustment, 'bundle_adjust', noted)
    monkeypatch.setattr(adjustment, 'POINTS_PIECE', 1000)
    loop, _ = drift(mapper, map_)
    for _ in close_loop(map_, map_.config, loop, with_scale=False,
                        corrected=lambda scale: None):
        pass
    longest = map_.landmarks.views().max()
    assert len(seen) > 3 and max(seen) <= 1000 + longest and max(poses) == 0


def test_keyframes_come_and_go_while_a_loop_is_being_closed(frames, encoder):
    mapper, map_ = mapped(frames[:50], encoder)
    loop, _ = drift(mapper, map_)
    mapper.backlog.close(loop, with_scale=False)
    keyframes = mapper.stats.keyframes
    mapper.work()
    for frame in frames[50:]:
        mapper.track(frame)
        mapper.work()
    assert mapper.stats.keyframes > keyframes and mapper.stats.lost == 0
    mapper.finish()
    found, truth = (np.array([T[:3, 3] for T in poses]) for poses in
                    (mapper.results.trajectory().T_map_cam, [f.T_map_cam for f in frames]))
    assert align_points(found, truth, with_scale=False).rmse < 0.02


def test_the_backlog_of_a_keyframe_goes_before_a_loop_closure(frames, encoder):
    """The sliding window does not wait for the pieces of a loop closure."""
    mapper, map_ = mapped(frames[:50], encoder)
    loop, _ = drift(mapper, map_)
    mapper.backlog.close(loop, with_scale=False)
    for frame in frames[50:]:
        if mapper.track(frame).is_keyframe:
            break
    assert mapper.backlog.is_due
    pieces = 0
    while mapper.backlog.is_due:
        assert mapper.work()
        pieces += 1
    assert pieces <= 4 and mapper.work(), 'the loop closure goes on afterwards'


def bytes_of(keyframe):
    features = keyframe.features
    return sum(a.nbytes for a in (
        features.keypoints, features.descriptors, features.confidence, keyframe.points_cam,
        keyframe.landmark, keyframe.rgb, keyframe.cloud_cam, keyframe.cloud_rgb))


@pytest.fixture(scope='module')
def laps(frames, encoder):
    """Four times there and back through the same part of a room, with many keyframes."""
    config = MapperConfig()
    config = replace(config, keyframes=replace(config.keyframes, min_gap=1, motion_share=0.02))
    map_, start = open_map(config, encoder, CAMERA)
    mapper, counts = Mapper(config, encoder, start=start), []
    walked = [frames[:36], frames[35::-1]] * 2
    for number, lap in enumerate(walked):
        for index, frame in enumerate(lap):
            stamp_ns = (number * len(lap) + index) * 100_000_000
            mapper.process(replace(frame, stamp_ns=stamp_ns))
        counts.append(mapper.stats.keyframes)
    return mapper, map_, counts, walked


def test_a_known_place_adds_hardly_any_keyframes(laps):
    mapper, _, counts, _ = laps
    assert mapper.stats.lost == 0 and mapper.stats.revisited > 10
    assert counts[-1] <= 2.5 * counts[0] and counts[-1] - counts[-2] <= 0.25 * counts[0]


def test_a_known_place_is_tracked_as_well_as_a_new_one(laps):
    mapper, _, _, walked = laps
    truth = np.array([f.T_map_cam[:3, 3] for lap in walked for f in lap])
    found = mapper.results.trajectory().T_map_cam[:, :3, 3]
    assert align_points(found, truth, with_scale=False).rmse < 0.01


def test_old_keyframes_are_small_and_read_as_before(laps, encoder):
    _, map_, _, walked = laps
    keyframe, size = map_.keyframes[0], CAMERA.width * CAMERA.height
    # Per feature: pixel, descriptor, confidence, point, landmark, colour; per cloud point: 9.
    cloud = size / MapperConfig().cloud.stride_px**2 * 9
    feature = 8 + encoder.dim + 4 + 12 + 4 + 3
    assert bytes_of(keyframe) <= len(keyframe.features) * feature + cloud + 1000
    again = encoder.encode(walked[0][0].image)
    similarity = np.einsum('nd,nd->n', keyframe.descriptors, again.descriptors)
    assert keyframe.descriptors.dtype == np.float32 and similarity.min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(keyframe.descriptors, axis=1), 1, atol=1e-5)


def test_all_clouds_together_are_bounded():
    """Twice the keyframes, half the points of each: the sum keeps to its bound."""
    config, rng = CloudConfig(max_points=1000), np.random.default_rng(0)
    packer, keyframes = KeyframePacker(config), []
    for id_ in range(100):
        features = Features(np.zeros((5, 2), np.float32), np.ones((5, 4), np.float32),
                            np.ones(5, np.float32), np.ones(4, np.float32))
        keyframes.append(MapKeyframe(id_, id_, id_, CAMERA, features, np.zeros((5, 3)),
                                     np.zeros(5, int), np.zeros((5, 3), np.uint8),
                                     cloud_cam=rng.random((500, 3), np.float32),
                                     cloud_rgb=np.zeros((500, 3), np.uint8)))
        packer.pack(keyframes, len(keyframes))
        assert sum(len(k.cloud_cam) for k in keyframes) <= CLOUD_FACTOR * config.max_points
    sizes = [len(k.cloud_cam) for k in keyframes]
    assert min(sizes) > 0 and max(sizes) <= 2 * min(sizes)
    assert all(len(k.cloud_cam) == len(k.cloud_rgb) for k in keyframes)
