"""The session of a running robot: modes, saving, loading, and what a failed call must not do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_config import SMALL

from feedforward_recon.errors import InputError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.session.live import NO_MAP, LiveSession
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Status

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 10.0
T_FIRST = se3_exp(np.array([0.2, -0.1, 0.5, 1.2, -1.2, 1.2]))


@pytest.fixture(scope='module')
def frames(room_walk):
    return room_walk[:60]


@pytest.fixture(scope='module')
def elsewhere():
    room = Room.generate(11)
    return list(render_walk(room, CAMERA, room.walk(120, seed=0, fps=FPS)[:4], fps=FPS))


def mapped(frames, encoder, T_map_first=None):
    session = LiveSession(SMALL, encoder)
    for frame in frames:
        session.process(frame, T_map_first)
    return session


@pytest.fixture(scope='module')
def saved(frames, encoder, tmp_path_factory):
    session = mapped(frames[::2], encoder, T_FIRST)
    return session.save(tmp_path_factory.mktemp('live') / 'map')()


@pytest.fixture
def located(saved, encoder):
    session = LiveSession(SMALL, encoder)
    session.load(saved.path)
    return session


def position_error(T_a, T_b):
    return float(pose_error(T_a[None], T_b[None])[0][0])


@pytest.mark.parametrize('depth', [True, False])
def test_the_first_pose_sets_the_frame_of_the_map_and_nothing_else(frames, encoder, depth):
    some = frames[:25] if depth else [replace(f, depth=None) for f in frames[:25]]
    T_first = T_FIRST.copy()
    T_first[:3, 3] *= depth  # where lengths are unknown the origin is in the camera
    here, there = mapped(some, encoder), mapped(some, encoder, T_first)
    for a, b in zip(here.keyframe_poses().T_map_cam, there.keyframe_poses().T_map_cam,
                    strict=True):
        np.testing.assert_allclose(T_first @ a, b, atol=3e-3)
    assert len(here.keyframe_poses()) > 3
    np.testing.assert_allclose(there.keyframe_poses().T_map_cam[0], T_first, atol=1e-9)
    assert (here.info.frame, there.info.frame) == ('first camera', 'z up')


def test_the_image_that_starts_the_map_brings_its_pose_not_a_black_one_before(frames, encoder):
    session = LiveSession(SMALL, encoder)
    session.process(replace(frames[0], image=np.zeros_like(frames[0].image)), np.eye(4))
    for frame, T_map_first in ((frames[1], T_FIRST), (frames[2], np.eye(4))):
        session.process(frame, T_map_first)
    np.testing.assert_allclose(session.keyframe_poses().T_map_cam[0], T_FIRST, atol=1e-9)


def test_a_saved_map_finds_the_frames_between_in_its_own_frame(saved, located, frames):
    assert saved.info.frame == 'z up' and saved.info.metres_per_unit == 1.0
    T_world_map = frames[0].T_map_cam @ inverse(T_FIRST)
    found = [located.process(replace(frame, depth=None)) for frame in frames[11:50:6]]
    errors = [position_error(T_world_map @ e.T_map_cam, f.T_map_cam)
              for e, f in zip(found, frames[11:50:6], strict=True) if e.T_map_cam is not None]
    assert len(errors) >= 6 and np.median(errors) < 0.02
    assert located.info.mode == 'localization' and located.info.memory_bytes > 0


def test_locating_writes_nothing(saved, located, frames):
    memory = located.load(saved.path).memory
    before = {name: t.clone() for name, t in memory.tensors().items()}
    first = located.locate(frames[21])
    again = located.locate(frames[21])
    assert np.array_equal(first.T_map_cam, again.T_map_cam)
    assert all(np.array_equal(before[n], t)
               for n, t in memory.tensors().items())


def test_a_stream_is_followed_and_queries_the_memory_after_a_hint(located, frames, monkeypatch):
    queries = []
    localize = Localizer.localize_features
    monkeypatch.setattr(Localizer, 'localize_features',
                        lambda *arguments: queries.append(1) or localize(*arguments))

    def queried(frame):
        before = len(queries)
        assert located.process(frame, finish_work=False).status.has_pose
        return len(queries) - before

    first, second, third, *_ = frames[20:]
    assert [queried(first), queried(second), queried(third)] == [1, 0, 0]
    assert located.locate(frames[5]).status.has_pose  # one image: the memory, not the stream
    assert queried(frames[23]) == 0
    located.hint(np.eye(4))
    assert [queried(frames[24]), queried(frames[25])] == [1, 0]
    located.reset()
    assert [queried(frames[26]), queried(frames[27])] == [1, 0]
    due = [located.process(frame, finish_work=False) and located.work() for frame in frames[28:40]]
    assert any(due) and not all(due)


def test_another_place_is_refused(located, elsewhere):
    for frame in elsewhere:
        estimate = located.locate(frame)
        assert estimate.status is Status.NOT_LOCALISED and estimate.T_map_cam is None


def test_freezing_and_going_on(frames, elsewhere, encoder):
    session = mapped(frames[:30], encoder)
    keyframes = session.info.keyframes
    session.set_localization(True)
    assert session.process(frames[20]).status.has_pose
    assert session.process(elsewhere[0]).status is Status.NOT_LOCALISED
    assert session.info.keyframes == keyframes
    session.set_localization(False)
    for frame in frames[30:]:
        estimate = session.process(frame)
    assert estimate.status.has_pose and session.info.keyframes > keyframes


def test_failed_calls_keep_everything(saved, located, frames, encoder, tmp_path):
    with pytest.raises(MapError, match='expected a map folder'):
        located.load(tmp_path / 'nothing')
    with pytest.raises(MapError, match='saved already'):
        located.save(tmp_path / 'copy')
    assert located.info.mode == 'localization'
    assert located.locate(frames[21]).status.has_pose
    empty = LiveSession(SMALL, encoder)
    for call in (lambda: empty.save(tmp_path / 'map'), lambda: empty.set_localization(True)):
        with pytest.raises(MapError, match='expected a map, found none'):
            call()
    with pytest.raises(InputError, match="parameter 'map'"):
        empty.save('')
    assert empty.locate(frames[0]).reason == NO_MAP
    assert empty.info.mode == 'mapping' and not (tmp_path / 'map').exists()


def test_saving_does_not_disturb_mapping(frames, encoder, tmp_path):
    session = mapped(frames[:30], encoder)
    job = session.save(tmp_path / 'map')
    estimate = session.process(frames[30])
    assert estimate.status.has_pose
    keyframes = job().info.keyframes
    assert keyframes <= session.info.keyframes


def test_an_autosave_holds_the_map_as_it_stands(frames, encoder, tmp_path):
    session = LiveSession(SMALL, encoder)
    for frame in frames[:40]:
        session.process(frame)
    poses = session.keyframe_poses()
    job = session.autosave(tmp_path / 'map')
    for frame in frames[40:]:
        session.process(frame)
    saved = job()
    assert saved.info.keyframes == len(poses) and saved.info.tracked == 40
    assert saved.localizer(encoder).localize(frames[20]).status.has_pose
    writer = saved.writer()
    # Also the keyframes that are still being refined.
    assert set(writer.network.samples) == set(range(len(poses)))


def test_only_a_map_that_grew_is_saved_again(frames, encoder, tmp_path):
    session = LiveSession(SMALL, encoder)
    assert session.autosave(tmp_path / 'map') is None and session.info.unsaved_keyframes == 0
    for frame in frames[:30]:
        session.process(frame)
    assert session.info.unsaved_keyframes == session.info.keyframes
    first = session.autosave(tmp_path / 'map')()
    assert session.autosave(tmp_path / 'map') is None and session.info.unsaved_keyframes == 0
    for frame in frames[30:]:
        session.process(frame)
    again = session.autosave(tmp_path / 'map')()
    assert again.info.keyframes > first.info.keyframes and again.backup is None
    session.reset()
    for frame in frames[:30]:
        session.process(frame)
    other = session.autosave(tmp_path / 'map')()
    assert load_map(other.backup).sha256 == again.sha256


def test_a_save_writes_the_memory_of_the_running_map(frames, encoder, tmp_path):
    """Nothing is done to it on the way: what was written is what is saved."""
    session = mapped(frames[:30], encoder)
    job = session.save(tmp_path / 'map')
    saved = job()
    written = saved.writer().snapshot().tensors()
    assert all(torch.equal(written[name], value)
               for name, value in saved.memory.tensors().items())


def test_reset_starts_again(frames, elsewhere, encoder, located):
    session = mapped(frames[:20], encoder)
    assert 'keyframes' in session.reset()
    assert not session.info.has_map and session.info.keyframes == 0
    for frame in elsewhere:
        assert session.process(frame).status.has_pose
    located.reset()
    assert located.locate(frames[21]).status.has_pose


def test_late_calibration_restarts_only_a_young_map(frames, encoder):
    session = mapped([replace(f, camera=None) for f in frames[:10]], encoder)
    assert 'started again' in session.set_camera(CAMERA)
    assert session.info.keyframes == 0
    assert mapped(frames[:10], encoder).set_camera(CAMERA) == ''


def test_odometry_gives_a_monocular_map_its_scale(frames, encoder, tmp_path):
    session = mapped([replace(f, depth=None) for f in frames[:40]], encoder)
    assert session.info.metres_per_unit is None and session.info.scale_source == 'unknown'
    session.set_odometry_scale(2.5)
    assert session.info.metres_per_unit == 2.5 and session.info.scale_source == 'odometry'
    info = session.save(tmp_path / 'map')().info
    assert (info.metres_per_unit, info.scale_source) == (2.5, 'odometry')
