"""The online loop on a synthetic room with exact truth: accuracy, and what must never happen."""

from dataclasses import replace

import numpy as np
import pytest
from open_map import open_map

from feedforward_recon.config.schema import CloudConfig, MapperConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import se3_exp, transform_points
from feedforward_recon.mapping.cloud import voxel_fused
from feedforward_recon.mapping.keyframes import EARLIER_SESSION
from feedforward_recon.mapping.loop_closure import Loop, close_loop
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.session.offline import map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Status

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 10.0


class MemoryLog:
    """A memory that records what is written to it."""

    def __init__(self):
        self.written, self.moved = [], []

    def write(self, keyframe):
        self.written.append(keyframe)

    def reanchor(self, poses):
        self.moved.append(poses)

    def correct(self, keyframe):
        pass


@pytest.fixture(scope='module')
def frames(room_walk):
    return room_walk


@pytest.fixture(scope='module')
def elsewhere():
    room = Room.generate(11)
    return list(render_walk(room, CAMERA, room.walk(120, seed=0, fps=FPS)[:8], fps=FPS))


def run(frames, encoder, memory=None, config=None, **options):
    mapper = Mapper(config or MapperConfig(), encoder, memory, **options)
    for frame in frames:
        mapper.process(frame)
    return mapper


class Recording(list):
    """Frames that are read in another state the second time."""

    def __init__(self, first, second):
        super().__init__(first)
        self.reads = iter([first, second])

    def __iter__(self):
        return iter(next(self.reads))


def without(frames, **changes):
    return [replace(frame, **changes) for frame in frames]


def ate(mapper, frames, with_scale):
    """Root mean square position error in metres after alignment, over the frames with a pose."""
    pairs = [(e.T_map_cam[:3, 3], f.T_map_cam[:3, 3])
             for e, f in zip(mapper.results.estimates, frames, strict=True)
             if e.T_map_cam is not None]
    found, true = (np.array(p) for p in zip(*pairs, strict=True))
    return align_points(found, true, with_scale=with_scale).rmse


def posed_share(mapper):
    return np.mean([e.T_map_cam is not None for e in mapper.results.estimates])


@pytest.fixture(scope='module')
def rgbd(frames, encoder):
    memory = MemoryLog()
    mapper = run(frames, encoder, memory)
    return mapper, mapper.finish(), memory


def test_rgbd_is_metric_and_accurate(rgbd, frames):
    mapper, scene, _ = rgbd
    assert posed_share(mapper) == 1.0
    assert ate(mapper, frames, with_scale=False) < 0.01
    assert scene.metres_per_unit == 1.0 and scene.scale_source == 'depth'
    assert 5 < len(scene.keyframes) < 60


def test_monocular_finds_the_same_walk_up_to_scale(frames, encoder):
    mapper = run(without(frames, depth=None), encoder)
    scene = mapper.finish()
    assert posed_share(mapper) > 0.95
    assert ate(mapper, frames, with_scale=True) < 0.02
    assert scene.metres_per_unit is None and scene.scale_source == 'unknown'
    assert np.array_equal(scene.keyframes[0].T_map_cam, np.eye(4))
    assert len(scene.cloud) > 100


def test_a_guessed_camera_is_named_and_refined(frames, encoder):
    mapper = run(without(frames, depth=None, camera=None), encoder)
    assert mapper.results.camera_source in ('guessed', 'refined')
    scene = mapper.finish()
    assert scene.camera_source == 'refined'
    assert mapper.results.camera.fx == pytest.approx(CAMERA.fx, rel=0.02)
    assert ate(mapper, frames, with_scale=True) < 0.03


def test_keyframe_points_lie_on_the_surfaces(rgbd, frames):
    _, scene, _ = rgbd
    depth_of = {f.stamp_ns: f.depth for f in frames}
    for keyframe in scene.keyframes:
        known = keyframe.has_point
        u, v = np.rint(keyframe.features.keypoints[known]).astype(int).T
        true = depth_of[keyframe.stamp_ns][v.clip(0, 239), u.clip(0, 319)]
        assert known.mean() > 0.5
        assert np.mean(np.abs(keyframe.points_cam[known, 2] / true - 1) < 0.02) > 0.9


def test_every_keyframe_reaches_the_memory_once_and_in_order(rgbd):
    _, scene, memory = rgbd
    assert [k.id for k in memory.written] == list(range(len(scene.keyframes)))
    assert all(set(poses) <= set(range(len(scene.keyframes))) for poses in memory.moved)


def test_covariances_are_positive_definite(rgbd):
    mapper, _, _ = rgbd
    for estimate in mapper.results.estimates:
        assert np.linalg.eigvalsh(estimate.covariance).min() > 0
        np.testing.assert_allclose(estimate.covariance, estimate.covariance.T)


def test_the_same_frames_give_the_same_map(frames, encoder):
    first, second = (run(frames[:40], encoder) for _ in range(2))
    for a, b in zip(first.results.estimates, second.results.estimates, strict=True):
        assert np.array_equal(a.T_map_cam, b.T_map_cam)


def test_given_poses_are_kept_bit_for_bit(frames, encoder):
    memory = MemoryLog()
    mapper = run(without(frames[:50], depth=None), encoder, memory,
                 source=GivenPoses(MapperConfig(), encoder))
    scene = mapper.finish()
    assert scene.metres_per_unit == 1.0 and scene.scale_source == 'given poses'
    by_stamp = {f.stamp_ns: f.T_map_cam for f in frames}
    assert all(np.array_equal(k.T_map_cam, by_stamp[k.stamp_ns]) for k in scene.keyframes)
    assert len(memory.written) == len(scene.keyframes) > 3
    assert sum(k.has_point.sum() for k in scene.keyframes) > 100 * len(scene.keyframes)


@pytest.mark.parametrize('depth', [True, False])
def test_bad_frames_are_lost_and_do_no_harm(frames, encoder, depth):
    frames = frames[:60] if depth else without(frames[:60], depth=None)
    black = np.zeros_like(frames[0].image)
    bad = range(40, 45)
    spoiled = [replace(f, image=black) if i in bad else f for i, f in enumerate(frames)]
    mapper = Mapper(MapperConfig(), encoder)
    for index, frame in enumerate(spoiled):
        before = mapper.stats.keyframes
        estimate = mapper.process(frame)
        if index in bad:
            assert estimate.status is Status.LOST and estimate.T_map_cam is None
            assert estimate.reason and mapper.stats.keyframes == before
    assert mapper.results.estimates[-1].status.has_pose
    mapper.finish()
    assert ate(mapper, spoiled, with_scale=not depth) < 0.02


def test_a_standing_camera_adds_no_keyframes(frames, encoder):
    mapper = run(frames[:30], encoder)
    count = mapper.stats.keyframes
    for k in range(40):
        mapper.process(replace(frames[29], stamp_ns=frames[29].stamp_ns + (k + 1) * 100_000_000))
    assert mapper.stats.keyframes <= count + 1
    assert mapper.results.estimates[-1].status is Status.TRACKING


def test_a_monocular_map_waits_for_parallax(encoder):
    room = Room.generate(7)
    frames = list(render_walk(room, CAMERA, room.walk(1200, seed=0, fps=50.0)[:40], fps=50.0))
    mapper, index = Mapper(MapperConfig(), encoder), 0
    while len(mapper.results.keyframes) < 2:
        mapper.process(replace(frames[index], depth=None))
        index += 1
    baseline = np.linalg.norm((frames[index - 1].T_map_cam - frames[0].T_map_cam)[:3, 3])
    depth = np.median(frames[0].depth[frames[0].depth > 0])
    assert 1.5 < np.rad2deg(baseline / depth) < 3.0


@pytest.mark.parametrize('depth', [True, False])
def test_a_camera_is_relocalised_after_a_gap(frames, encoder, depth):
    kept = frames[:45] + frames[55:]
    kept = kept if depth else without(kept, depth=None)
    mapper = run(kept, encoder)
    mapper.finish()
    assert posed_share(mapper) > 0.95
    assert ate(mapper, kept, with_scale=not depth) < 0.02


def test_another_place_is_lost_and_leaves_the_map_alone(frames, elsewhere, encoder):
    mapper = run(frames[:60], encoder)
    before = [k.T_map_cam.copy() for k in mapper.results.keyframes]
    start = frames[59].stamp_ns
    for k, frame in enumerate(elsewhere):
        estimate = mapper.process(replace(frame, stamp_ns=start + (k + 1) * 100_000_000))
        assert estimate.status is Status.LOST
    after = [k.T_map_cam for k in mapper.results.keyframes]
    assert len(before) == len(after)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert mapper.process(replace(frames[58], stamp_ns=start + 10**10)).status.has_pose


def test_missed_frames_are_relocalised_and_no_surer_than_their_keyframes(frames, encoder):
    frames, missed = without(frames[:60], depth=None), {12: Status.UNCERTAIN, 50: Status.TRACKING}
    dark = [replace(f, image=np.zeros_like(f.image)) for f in frames]
    mapper = run([dark[i] if i in missed else f for i, f in enumerate(frames)], encoder)
    mapper.finish()
    keyframes = len(mapper.results.keyframes)
    for index, status in missed.items():  # the first was when lengths were still changing
        assert mapper.results.estimates[index].T_map_cam is None
        assert mapper.relocalise_frame(index, frames[index]).status is status
    assert len(mapper.results.keyframes) == keyframes
    assert ate(mapper, frames, with_scale=True) < 0.02
    for keyframe in mapper._map.keyframes:  # of those that were loaded no status is known
        keyframe.frame = EARLIER_SESSION
    mapper._history.record(replace(mapper.results.estimates[-1], status=Status.UNCERTAIN), 0,
                           mapper._map.T_map_cam[0], len(frames) - 1)
    assert mapper.relocalise_frame(12, frames[12]).status is Status.TRACKING


def test_a_camera_found_by_a_strip_of_its_image_is_not_sure_of_its_pose(frames, encoder):
    image, depth = frames[30].image, frames[30].depth
    mapper = run([*frames[:30], replace(frames[30], image=np.zeros_like(image)), *frames[31:40]],
                 encoder)
    mapper.finish()
    strip = image.copy()
    strip[:, :200] = 128
    for shown, sensed, status in ((strip, None, Status.UNCERTAIN), (image, None, Status.TRACKING),
                                  (strip, None, Status.TRACKING)):  # no pose for a worse one
        frame = replace(frames[30], image=shown, depth=sensed)
        assert mapper.relocalise_frame(30, frame).status is status
    assert mapper.relocalise_frame(29, replace(frames[30], image=strip, depth=depth)
                                   ).status is Status.TRACKING


def test_offline_reconstruction_is_the_online_one_and_more(frames, encoder):
    blurred = replace(frames[20], image=np.zeros_like(frames[20].image))
    recording = Recording([*frames[:20], blurred, *frames[21:30]], [*frames[:30]])
    scene = map_frames(recording, encoder=encoder).scene
    assert len(scene.estimates) == 30 and len(scene.trajectory) == 30
    assert scene.metres_per_unit == 1.0


def test_a_correction_moves_keyframes_and_their_points_together(frames, encoder):
    map_, start = open_map(MapperConfig(), encoder, CAMERA)
    run(frames[:60], encoder, start=start)
    last = len(map_) - 1
    ids = np.flatnonzero(map_.landmarks.has_point & (map_.landmarks.anchor == last))
    before = map_.landmarks.points_map(ids, map_.T_map_cam)
    T_before = map_.T_map_cam.copy()
    shifted = T_before[last] @ se3_exp(np.array([0.1, 0, 0, 0, 0, 0.02]))
    loop = Loop(last, 0, shifted, 1.0, np.zeros(0, int), np.zeros(0, int), 20.0, 1000)
    pieces = close_loop(map_, map_.config, loop, with_scale=False,
                        corrected=lambda scale: None)
    while np.array_equal(map_.T_map_cam, T_before):
        next(pieces)
    motion = map_.T_map_cam[last] @ np.linalg.inv(T_before[last])
    assert np.linalg.norm(motion[:3, 3]) > 0.01
    assert np.array_equal(map_.T_map_cam[0], T_before[0])
    after = map_.landmarks.points_map(ids, map_.T_map_cam)
    np.testing.assert_allclose(after, transform_points(motion, before), atol=1e-6)


def test_unusable_input_raises_an_error_that_says_why(frames, encoder):
    mapper = run(frames[:2], encoder)
    with pytest.raises(InputError, match='320x240'):
        mapper.process(replace(frames[2], image=frames[2].image[:100]))
    with pytest.raises(InputError, match='RGB'):
        mapper.process(replace(frames[2], image=frames[2].image[..., 0]))
    with pytest.raises(InputError, match='depth'):
        mapper.process(replace(frames[2], depth=frames[2].depth[:100]))
    assert mapper.process(frames[2]).status is Status.TRACKING


def test_a_camera_without_depth_readings_waits(frames, encoder):
    blind = without(frames[:3], depth=np.zeros((240, 320), np.float32))
    mapper = run(blind, encoder)
    assert mapper.results.estimates[-1].status is Status.INITIALISING
    assert 'depth' in mapper.results.estimates[-1].reason
    assert mapper.process(frames[3]).status is Status.TRACKING


def test_the_cloud_is_fused_and_capped(rgbd):
    _, scene, _ = rgbd
    voxel = CloudConfig().voxel_m
    cells = np.floor(scene.cloud.xyz / voxel).astype(int)
    assert len(np.unique(cells, axis=0)) > 0.9 * len(scene.cloud)
    capped = voxel_fused([lambda: (scene.cloud.xyz, scene.cloud.rgb)], voxel, 500)
    assert len(capped) == 500 and capped.xyz.dtype == np.float32


def test_a_cloud_fused_in_parts_is_the_cloud_fused_at_once(rgbd, monkeypatch):
    source = rgbd[0].results.cloud_source()
    at_once = source.fused()
    monkeypatch.setattr('feedforward_recon.mapping.cloud.FUSED_AT_ONCE', 5000)
    sizes = [len(part) for part in source.xyz]
    assert max(sizes) < 5000 and sum(sizes) > 3 * 5000, 'more than three parts'
    in_parts = source.fused()
    np.testing.assert_allclose(in_parts.xyz, at_once.xyz, atol=1e-6)
    assert np.abs(in_parts.rgb.astype(int) - at_once.rgb).max() <= 1


def test_the_backlog_may_be_worked_on_between_frames(frames, encoder):
    """A live node goes on tracking while the backlog of a keyframe is done piece by piece."""
    memory = MemoryLog()
    mapper = Mapper(MapperConfig(), encoder, memory)
    for frame in frames:
        mapper.track(frame)
        mapper.work()
    scene = mapper.finish()
    assert posed_share(mapper) == 1.0
    assert ate(mapper, frames, with_scale=False) < 0.01
    assert [k.id for k in memory.written] == list(range(len(scene.keyframes)))


@pytest.mark.parametrize('depth', [True, False])
def test_poses_before_a_keyframe_is_made_are_those_of_the_map(frames, encoder, depth):
    mapper, early = Mapper(MapperConfig(), encoder), {}
    for frame in frames if depth else without(frames, depth=None):
        mapper.track(frame, lambda estimate: early.update({estimate.stamp_ns: estimate}))
        mapper.work()
    found = {e.stamp_ns: e for e in mapper.results.estimates if e.T_map_cam is not None}
    assert len(early) > 0.8 * len(found)
    apart = [np.linalg.norm(e.T_map_cam[:3, 3] - found[s].T_map_cam[:3, 3])
             for s, e in early.items()]
    assert np.median(apart) < 0.01 and max(apart) < 0.05
