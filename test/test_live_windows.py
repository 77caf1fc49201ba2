"""Sessions that map a running camera with a network that predicts windows."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from small_config import SMALL
from test_windows import Oracle

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.sources.selection import ViewSelection
from feedforward_recon.mapping.sources.window import FeedForward
from feedforward_recon.mapping.sources.windows import FIRST_VIEWS, WindowPoses
from feedforward_recon.session.live import LiveSession
from feedforward_recon.session.networks import SessionNetwork
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Status, Trajectory

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 10.0
T_FIRST = se3_exp(np.array([0.0, 0.0, 0.0, 1.2, -1.2, 1.2]))


def walk(seed, count, start=0):
    room = Room.generate(seed)
    return list(render_walk(room, CAMERA, room.walk(240, seed=0, fps=FPS)[start:count], fps=FPS,
                            noise=1.0, seed=1))


@pytest.fixture(scope='module')
def frames():
    return walk(7, 70)


@pytest.fixture(scope='module')
def elsewhere():
    apart = np.eye(4)
    apart[0, 3] = 100
    return [replace(f, stamp_ns=f.stamp_ns + 10**12, T_map_cam=apart @ f.T_map_cam)
            for f in walk(11, 12)]


def shown(frame, depth=False):
    return replace(frame, T_map_cam=None, depth=frame.depth if depth else None)


def session_of(encoder, oracle, size=16, anchors=4, **options):
    return LiveSession(SMALL, encoder, load_network=lambda: SessionNetwork(FeedForward(
        oracle, WindowConfig(size, anchors))), **options)


class Stream:
    """A session with all its estimates: poses by stamp, in the order they were given out."""

    def __init__(self, session, T_first=None):
        self.session, self.T_first = session, T_first
        self.poses, self.order, self.at_once = {}, [], []

    def show(self, frames, depth=False, finish_work=True):
        for frame in frames:
            estimate = self.session.process(shown(frame, depth), self.T_first,
                                            finish_work=finish_work)
            self.at_once.append(estimate)
            self.take([*([estimate] if estimate.T_map_cam is not None else []),
                       *self.session.late()])
        return self

    def take(self, estimates):
        for estimate in estimates:
            assert estimate.stamp_ns not in self.poses, 'a pose was given out twice'
            self.order.append(estimate.stamp_ns)
            self.poses[estimate.stamp_ns] = estimate.T_map_cam

    def error(self, frames, alignment='sim3'):
        truth = Trajectory(np.array([f.stamp_ns for f in frames]),
                           np.stack([f.T_map_cam for f in frames]))
        stamps = np.array(sorted(self.poses))
        found = Trajectory(stamps, np.stack([self.poses[s] for s in stamps]))
        return absolute_trajectory_error(found, truth, alignment)


@pytest.fixture(scope='module')
def mapped(frames, encoder):
    """A walk mapped by an exact network, with the session afterwards; do not change it."""
    return Stream(session_of(encoder, Oracle(frames)), T_FIRST).show(frames)


def test_every_frame_after_the_first_window_has_a_pose_at_once(mapped, frames):
    status = [estimate.status for estimate in mapped.at_once]
    started = next(i for i, s in enumerate(status) if s.has_pose)
    assert FIRST_VIEWS <= started < 40
    assert all(s is Status.INITIALISING for s in status[:started])
    assert sum(s.has_pose for s in status[started:]) > 0.9 * len(status[started:])
    assert mapped.error(frames).rmse < 0.06


def test_views_of_the_first_window_get_late_poses_with_their_own_stamps(mapped, frames):
    started = next(i for i, e in enumerate(mapped.at_once) if e.status.has_pose)
    late = [s for s in mapped.order if s < frames[started].stamp_ns]
    assert len(late) == FIRST_VIEWS and late[0] == frames[0].stamp_ns
    assert mapped.order == sorted(mapped.order)


def test_progress_is_reported_until_there_is_a_map(mapped):
    assert mapped.at_once[0].reason == f'1 of {FIRST_VIEWS} views for a window'
    assert mapped.session.info.window.endswith('of 12 views for a window')
    assert mapped.session.info.keyframes >= 12 and mapped.session.info.has_map


def test_the_map_stands_upright_where_that_is_known(mapped, frames):
    assert mapped.session.info.frame == 'z up'
    np.testing.assert_allclose(mapped.poses[frames[0].stamp_ns], T_FIRST, atol=1e-6)


def test_a_camera_carried_elsewhere_is_lost_and_found_again(frames, elsewhere, encoder):
    known = frames + [replace(f, T_map_cam=f.T_map_cam) for f in elsewhere]
    network = Oracle(known)
    stream = Stream(session_of(encoder, network)).show(frames[:50])
    keyframes = stream.session.keyframe_poses()
    assert len(keyframes) >= FIRST_VIEWS
    stream.show(elsewhere)
    status = [e.status for e in stream.at_once[50:]]
    assert Status.LOST in status and status[-1] is Status.LOST
    back = [replace(f, stamp_ns=f.stamp_ns + 2 * 10**12) for f in frames[20:45]]
    network.known |= {f.image.tobytes(): f for f in back}
    stream.show(back)
    assert sum(e.status.has_pose for e in stream.at_once[-25:]) > 20
    stamps = set(stream.session.keyframe_poses().stamps_ns)
    assert set(keyframes.stamps_ns) <= stamps
    assert not stamps & {f.stamp_ns for f in elsewhere[2:]}, 'another place was mapped'


def test_out_of_memory_means_smaller_windows_also_here(frames, encoder, caplog):
    oracle = Oracle(frames, limit=5)
    stream = Stream(session_of(encoder, oracle)).show(frames[:55])
    assert max(oracle.sizes) <= 5 and 'out of memory' in caplog.text
    assert stream.at_once[-1].status.has_pose and len(stream.poses) > 20


def test_a_device_too_small_for_two_images_is_an_error_and_the_session_goes_on(frames, encoder):
    stream = Stream(session_of(encoder, Oracle(frames, limit=1)))
    with pytest.raises(InputError, match='enough memory for two images'):
        stream.show(frames[:45])
    assert stream.session.info.keyframes == 0 and not stream.session.late()
    assert 'forgot' in stream.session.reset()


def test_saving_maps_the_views_that_wait_and_mapping_goes_on(frames, encoder, tmp_path):
    stream = Stream(session_of(encoder, Oracle(frames))).show(frames[:30])
    assert not stream.poses and not stream.session.info.has_map
    info = stream.session.save(tmp_path / 'map')().info
    stream.take(stream.session.late())
    assert info.keyframes > 3 and len(stream.poses) >= info.keyframes
    assert info.images == 30 and info.metres_per_unit is None
    stream.show(frames[30:45])
    assert all(e.status.has_pose for e in stream.at_once[30:40])
    stream.session.save(tmp_path / 'map')()
    other = LiveSession(SMALL, encoder)
    saved = other.load(tmp_path / 'map')
    assert np.all(np.diff(saved.trajectory().stamps_ns) > 0)
    found = [other.process(shown(frame)) for frame in frames[5:40:7]]
    assert sum(e.T_map_cam is not None for e in found) >= 4


def test_saving_without_a_map_is_an_error(frames, encoder, tmp_path):
    session = session_of(encoder, Oracle(frames))
    with pytest.raises(MapError, match='expected a map, found none'):
        session.save(tmp_path / 'map')
    with pytest.raises(MapError, match='expected a map, found none'):
        session.set_localization(True)


def test_depth_gives_metres(frames, encoder):
    stream = Stream(session_of(encoder, Oracle(frames)), T_FIRST).show(frames[:50], depth=True)
    assert stream.session.info.scale_source == 'depth'
    T_map_world = T_FIRST @ inverse(frames[0].T_map_cam)
    by_stamp = {f.stamp_ns: T_map_world @ f.T_map_cam for f in frames}
    off = [pose_error(T[None], by_stamp[stamp][None])[0][0] for stamp, T in stream.poses.items()]
    assert np.median(off) < 0.02


def test_frozen_maps_localise_and_go_on(frames, encoder):
    stream = Stream(session_of(encoder, Oracle(frames))).show(frames[:45])
    stream.session.set_localization(True)
    keyframes = stream.session.info.keyframes
    assert stream.session.process(shown(frames[20])).status.has_pose
    stream.session.set_localization(False)
    stream.session.late()
    for frame in frames[45:]:
        estimate = stream.session.process(shown(frame))
    assert estimate.status.has_pose and stream.session.info.keyframes > keyframes


def test_another_image_size_is_refused_and_a_reset_takes_it(frames, encoder):
    stream = Stream(session_of(encoder, Oracle(frames))).show(frames[:3])
    small = replace(frames[3], image=frames[3].image[:200].copy(), camera=None)
    with pytest.raises(InputError, match='expected images of 320x240 as before, found 320x200'):
        stream.session.process(shown(small))
    stream.session.reset()
    assert stream.session.process(shown(small)).status is Status.INITIALISING


def test_a_calibration_that_comes_late_starts_again(frames, encoder):
    session = session_of(encoder, Oracle(frames))
    for frame in frames[:3]:
        session.process(replace(shown(frame), camera=None))
    assert 'started again' in session.set_camera(CAMERA)
    assert session.info.window == ''
    session.process(shown(frames[3]))
    assert session.set_camera(CAMERA) == ''


def test_localising_needs_no_network_until_mapping_begins(encoder):
    asked = []

    def load():
        asked.append(1)
        raise InputError('no weights')

    session = LiveSession(SMALL, encoder, 'localization', load_network=load)
    assert not asked
    with pytest.raises(InputError, match='no weights'):
        session.set_localization(False)
    assert session.mode == 'localization'
    with pytest.raises(InputError, match='no weights'):
        LiveSession(SMALL, encoder, load_network=load)


class Slow(Oracle):
    """An oracle that waits for ``go`` before each answer."""

    def __init__(self, frames):
        super().__init__(frames)
        self.go = threading.Event()

    def predict(self, images, memory=None, *, write=True, keep=True, K=None):
        assert self.go.wait(60)
        return super().predict(images, memory, write=write, keep=keep, K=K)


def test_the_camera_goes_on_while_the_network_works(frames, encoder):
    network, ready = Slow(frames), threading.Event()
    stream = Stream(session_of(encoder, network, on_ready=ready.set))
    session = stream.session
    for frame in frames[:45]:
        stream.show([frame], finish_work=False)
        while session.work():
            pass
    assert session.info.is_busy and not stream.poses
    assert session.info.window == 'the network looks at 8 views'
    network.go.set()
    assert ready.wait(60)
    while session.work():
        pass
    stream.take(session.late())
    assert len(stream.poses) == FIRST_VIEWS
    stream.show([frames[45]], finish_work=False)
    assert stream.at_once[-1].status.has_pose


def test_views_that_a_slow_network_cannot_take_are_thinned_out(frames, encoder, caplog):
    network = Slow(frames)
    stream = Stream(session_of(encoder, network, size=3, anchors=1))
    for frame in frames[:60]:
        stream.show([frame], finish_work=False)
        while stream.session.work():
            pass
    assert 'slower than the camera' in caplog.text
    network.go.set()


def test_stamps_that_jump_back_start_a_new_time_line(frames, encoder):
    network = Oracle(frames)
    stream = Stream(session_of(encoder, network)).show(frames[:45])
    late = [replace(f, stamp_ns=f.stamp_ns - 10**12) for f in frames[30:40]]
    network.known |= {f.image.tobytes(): f for f in late}
    stream.show(late)
    assert {f.stamp_ns for f in late[2:]} <= set(stream.poses)


def test_views_are_frames_that_show_something_new(frames):
    prepared = Preparation(SMALL.tracking)
    still, moving = ViewSelection(SMALL), ViewSelection(SMALL)
    first = [prepared.view(frames[0], index) for index in range(40)]
    assert [still.takes(view) for view in first] == [True] + 39 * [False]
    taken = [moving.takes(prepared.view(frame, i)) for i, frame in enumerate(frames)]
    assert 8 <= sum(taken) <= 35
    black = prepared.view(replace(frames[0], image=np.zeros_like(frames[0].image)), 0)
    assert not any(ViewSelection(SMALL).takes(black) for _ in range(5))


def test_a_window_without_texture_starts_no_map(frames, encoder):
    """Its views have no pose, and what the network says of them is no map."""
    dark = [replace(f, image=np.full_like(f.image, i)) for i, f in enumerate(frames[:4])]
    source = WindowPoses(SMALL, Oracle(dark), encoder, windows=WindowConfig(4, 1))
    mapper = Mapper(SMALL, encoder, source=source)
    for frame in dark:
        mapper.process(shown(frame))
    estimates = mapper.results.estimates
    assert [e.status for e in estimates] == [Status.INITIALISING] * 4
    assert not mapper.finish().keyframes
