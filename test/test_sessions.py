"""Sessions: later runs are localised in a saved map and extend it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from open_map import open_map
from small_config import SMALL

from feedforward_recon.errors import MapError
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error
from feedforward_recon.mapping.keyframe_graph import keyframe_graph
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.memory.coordinate_network import STEPS_PER_UNIT
from feedforward_recon.memory.network_writer import NetworkWriter
from feedforward_recon.session.live import LiveSession
from feedforward_recon.session.map_folder import KEYFRAMES, MEMORY, load_map
from feedforward_recon.session.offline import map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Status

CAMERA = Camera.from_fov(68.0, (320, 240))
FPS = 10.0
LATER_NS = 10**12


@pytest.fixture(scope='module')
def frames(room_walk):
    return room_walk[:70]


@pytest.fixture(scope='module')
def elsewhere():
    room = Room.generate(11)
    return list(render_walk(room, CAMERA, room.walk(120, seed=0, fps=FPS)[:3], fps=FPS))


def again(frames, times=1):
    """The same views, seen on a later day."""
    return [replace(f, stamp_ns=f.stamp_ns + times * LATER_NS) for f in frames]


def parts(frames, depth=True):
    """Three sessions that overlap by ten frames."""
    shown = frames if depth else [replace(f, depth=None) for f in frames]
    return [again(shown[first:first + 30], day) for day, first in enumerate((0, 20, 40))]


def mapped(frames, encoder, folder, into=None):
    return map_frames(frames, SMALL, encoder, into=into).save(folder)


@pytest.fixture(scope='module')
def first_day(frames, encoder, tmp_path_factory):
    """A saved map of forty frames; do not change it."""
    return mapped(frames[:40], encoder, tmp_path_factory.mktemp('first') / 'map')


@pytest.fixture
def copied(first_day, tmp_path):
    """The same map in a folder of the test."""
    shutil.copytree(first_day.path, tmp_path / 'map')
    return load_map(tmp_path / 'map')


@pytest.fixture(scope='module', params=[True, False], ids=['depth', 'monocular'])
def sessions(request, frames, encoder, tmp_path_factory):
    """The folder after each of three sessions, and the frames of each."""
    root, saved, shown = tmp_path_factory.mktemp('sessions'), [], parts(frames, request.param)
    for number, part in enumerate(shown):
        saved.append(mapped(part, encoder, root / str(number), saved[-1] if saved else None))
    return saved, shown


def test_all_sessions_share_one_frame_and_one_scale(sessions):
    """One alignment, that of the first session, fits them all."""
    saved, shown = sessions
    assert [s.info.sessions for s in saved] == [1, 2, 3]
    fit = None
    for map_, part in zip(saved, shown, strict=True):
        found, true = map_.trajectory(), {f.stamp_ns: f.T_map_cam[:3, 3] for f in part}
        centres = np.stack([true[stamp] for stamp in found.stamps_ns])
        fit = fit or align_points(found.positions, centres,
                                  with_scale=saved[0].info.metres_per_unit is None)
        off = np.linalg.norm(fit.apply_to_poses(found.T_map_cam)[:, :3, 3] - centres, axis=1)
        # Without depth the scale of a short first session is known to a few percent only.
        limit = 0.06 if saved[0].info.metres_per_unit is None else 0.04
        assert len(found) >= 0.9 * len(part) and np.median(off) < limit
        assert (map_.info.metres_per_unit, map_.info.frame) == (
            saved[0].info.metres_per_unit, saved[0].info.frame)


def test_places_of_earlier_sessions_stay_found(sessions, encoder):
    saved, shown = sessions
    queries = again([replace(f, depth=None) for f in shown[0][3:28:3]], 5)
    recall = [np.mean([map_.localizer(encoder).localize(f).status.has_pose for f in queries])
              for map_ in saved]
    assert recall[0] >= 0.9 and recall[2] >= recall[0] - 0.05


def test_the_memory_keeps_its_bytes_and_the_keyframes_theirs(sessions):
    saved, _ = sessions
    sizes = {map_.info.files[MEMORY]['bytes'] for map_ in saved}
    assert len(sizes) == 1
    keyframes = [map_.info.keyframes for map_ in saved]
    assert keyframes[0] < keyframes[1] < keyframes[2]


def test_nothing_is_mapped_before_a_frame_is_found(sessions, elsewhere, encoder):
    saved, shown = sessions
    session = LiveSession(SMALL, encoder)
    session.load(saved[0].path, extend=True)
    depth = shown[0][0].depth is not None
    strange = [replace(f, depth=f.depth if depth else None) for f in elsewhere]
    before = session.info.keyframes
    assert before == saved[0].info.keyframes and session.info.mode == 'mapping'
    assert all(session.process(f).status is Status.LOST for f in strange)
    assert session.info.keyframes == before and session.info.unsaved_keyframes == 0
    assert session.locate(shown[0][10]).status.has_pose  # it can be asked meanwhile
    with pytest.raises(MapError, match='found none in 3 images; the map is unchanged'):
        session.save(saved[0].path)
    with pytest.raises(MapError, match='the map is unchanged'):
        map_frames(strange, SMALL, encoder, into=saved[0])
    for frame in again(shown[1], 3):
        estimate = session.process(frame)
    assert estimate.status.has_pose and session.info.keyframes > before


def test_going_on_and_saving_replaces_the_map_without_a_backup(frames, encoder, copied):
    saved = copied
    session = LiveSession(SMALL, encoder)
    session.load(saved.path, extend=True)
    for frame in again(frames[30:50]):
        session.process(frame)
    longer = session.save(saved.path)()
    assert longer.backup is None and longer.info.keyframes > saved.info.keyframes
    session.reset()
    for frame in frames[:12]:
        session.process(frame)
    other = session.save(saved.path)()
    assert load_map(other.backup).sha256 == longer.sha256


def test_a_loaded_map_is_gone_on_with_when_localization_ends(frames, encoder, first_day):
    saved = first_day
    session = LiveSession(SMALL, encoder)
    session.load(saved.path)
    assert session.process(frames[20]).status.has_pose
    assert session.set_localization(False) == 'mode is mapping'
    for frame in again(frames[35:50]):
        estimate = session.process(frame)
    assert estimate.status.has_pose and session.info.keyframes > saved.info.keyframes


def test_a_saved_map_is_the_map_that_was_running(frames, encoder):
    """As far as it has landmarks: features that show none are not saved."""
    running, start = open_map(SMALL, encoder, CAMERA)
    mapper = Mapper(SMALL, encoder, start=start)
    for frame in frames[:40]:
        mapper.process(frame)
    map_ = mapper.finish().graph.restored(SMALL)
    assert len(map_) == len(running)
    for id_, (saved, keyframe) in enumerate(zip(map_.keyframes, running.keyframes, strict=True)):
        np.testing.assert_array_equal(map_.T_map_cam[id_], running.T_map_cam[id_])
        landmark = running.landmarks.alias[keyframe.landmark]
        shown = np.flatnonzero((keyframe.landmark >= 0) & running.landmarks.has_point[landmark])
        np.testing.assert_array_equal(saved.features.keypoints,
                                      keyframe.features.keypoints[shown])
        np.testing.assert_allclose(map_.points_cam(id_), running.points_cam(id_)[shown],
                                   atol=1e-3)
        described = running.landmarks.descriptor[landmark[shown]]  # as the landmark is
        assert (saved.descriptors * described).sum(1).min() > 0.99


def test_what_is_saved_to_go_on_is_bounded(frames, encoder, monkeypatch):
    """Fewer keyframes than the walk had; their landmarks stay where they were."""
    running, start = open_map(SMALL, encoder, CAMERA)
    mapper = Mapper(SMALL, encoder, start=start)
    for frame in frames:
        mapper.process(frame)
    scene = mapper.finish()
    monkeypatch.setattr('feedforward_recon.mapping.keyframe_graph.CLOUD_POINTS', 1000)
    whole, few = scene.graph, keyframe_graph(running, 5)
    assert len(few) == 5 and len(whole) == len(scene.keyframes) > 10
    bytes_of = [sum(a.nbytes for a in graph.arrays.values()) for graph in (few, whole)]
    assert bytes_of[0] < 0.5 * bytes_of[1]
    assert few.arrays['cloud_cam'].shape[0] <= 1000 + 5
    map_ = few.restored(SMALL)
    table, full = map_.landmarks, running.landmarks
    points = table.points_map(np.arange(len(table)), map_.T_map_cam)
    every = full.points_map(np.flatnonzero(full.has_point), running.T_map_cam)
    apart = np.linalg.norm(points[::50, None] - every[None], axis=2).min(1)
    assert len(table) > 200 and apart.max() < 1e-4
    assert set(table.seen_keyframe) == set(range(5))


def test_forgotten_keyframes_leave_their_points_in_the_memory(frames, encoder):
    """Slots and samples are where they were after keyframes were renumbered."""
    writer = MemoryWriter(SMALL.memory, encoder.dim)
    mapper = Mapper(SMALL, encoder, writer)
    for frame in frames[:50]:
        mapper.process(frame)
    kept = mapper.finish().graph.ids[::3]
    used = writer.slots.counts > 0
    before = writer.slots.map_points(writer.poses)[used]
    network = writer.network
    count, means = network.sums.count.copy(), network.sums.means()[0]
    writer.renumber(kept)
    assert len(writer.poses) == len(kept)
    np.testing.assert_allclose(writer.slots.map_points(writer.poses)[used], before, atol=1e-6)
    assert set(network.samples) == set(range(len(kept)))
    assert min(samples.points_cam[:, 2].min() for samples in network.samples.values()) > 0
    np.testing.assert_array_equal(network.sums.count, count)
    np.testing.assert_allclose(network.sums.means()[0], means, atol=1 / STEPS_PER_UNIT)
    fresh = NetworkWriter(network.cells, network.capacity, network.keys)
    fresh.restore(network.state())
    for name in ('count', 'points', 'squares', 'depths'):
        np.testing.assert_array_equal(getattr(fresh.sums, name), getattr(network.sums, name))


def test_a_map_that_cannot_be_extended_is_an_error(encoder, copied):
    saved = copied
    session = LiveSession(SMALL, encoder)
    info = replace(saved.info, files={name: about for name, about in saved.info.files.items()
                                      if name != KEYFRAMES})
    other = replace(saved, info=replace(saved.info, encoder_sha256='0' * 64))
    with pytest.raises(MapError, match='expected the encoder with SHA-256 000000000000'):
        map_frames([], SMALL, encoder, into=other)
    with pytest.raises(MapError, match='saved without'):
        replace(saved, info=info).start(SMALL, encoder)
    (saved.path / KEYFRAMES).write_bytes((saved.path / KEYFRAMES).read_bytes()[:-100])
    with pytest.raises(MapError, match='truncated'):
        session.load(saved.path, extend=True)
    assert session.info.mode == 'mapping' and not session.info.has_map
    network = LiveSession(SMALL, encoder, 'localization', load_network=lambda: None)
    with pytest.raises(MapError, match='model compact'):
        network.load(saved.path, extend=True)


def test_a_camera_without_intrinsics_is_that_of_the_map(frames, encoder, first_day):
    saved = first_day
    shown = [replace(f, camera=None) for f in again(frames[30:50])]
    run = map_frames(shown, SMALL, encoder, into=saved)
    assert run.scene.camera_source == 'given' and run.tracked_share > 0.9
    last = run.scene.trajectory.T_map_cam[-1]
    true = saved.trajectory().T_map_cam[0] @ inverse(frames[0].T_map_cam) @ frames[49].T_map_cam
    assert float(pose_error(last[None], true[None])[0][0]) < 0.03


def test_unit_and_axes_are_those_of_the_saved_map(first_day, encoder):
    """Also where they came from gravity and odometry, which a later session may lack."""
    info = replace(first_day.info, frame='z up', metres_per_unit=2.5, scale_source='odometry')
    start, _ = replace(first_day, info=info).start(SMALL, encoder)
    gauge = Mapper(SMALL, encoder, start=start).results.gauge
    assert (gauge.frame, gauge.metres_per_unit, gauge.scale_source) == ('z up', 2.5, 'odometry')
