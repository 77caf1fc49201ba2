"""Two maps of one place become one map, whatever their frames and units."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.cli import main
from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.config.schema import EncoderConfig, MapperConfig, MemoryConfig
from feedforward_recon.errors import MapError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error, se3_exp
from feedforward_recon.mapping.joining import add_map, find_joint
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import load_map, save_map
from feedforward_recon.session.merging import merge_maps, moved_images
from feedforward_recon.session.offline import map_frames
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Trajectory

CONFIG = MapperConfig(encoder=EncoderConfig(max_keypoints=500), memory=MemoryConfig(slots=6000))
# How the frame of the second map lies in that of the first.
T_A_B = se3_exp(np.array([3.0, -1.0, 0.5, 0.2, 0.9, -0.4]))


@pytest.fixture(scope='module')
def frames(room_camera):
    """Frames of a walk, which the two maps share in the middle."""
    room = Room.generate(5)
    return list(render_walk(room, room_camera, room.walk(40, seed=1, fps=8.0), fps=8.0))


def mapped(frames, folder, T_new_map=None, depth=True):
    """A saved map with the true poses, in a frame of its own."""
    moved = [replace(f, T_map_cam=f.T_map_cam if T_new_map is None else T_new_map @ f.T_map_cam,
                     depth=f.depth if depth else None) for f in frames]
    encoder = CompactEncoder.load(config=CONFIG.encoder)
    run = map_frames(moved, CONFIG, encoder, source=lambda _: GivenPoses(CONFIG, encoder))
    return run.save(folder)


@pytest.fixture(scope='module')
def halves(frames, tmp_path_factory):
    """Two maps that overlap by eight frames."""
    root = tmp_path_factory.mktemp('halves')
    return mapped(frames[:24], root / 'a'), mapped(frames[16:], root / 'b', np.linalg.inv(T_A_B))


def graphs(halves):
    return tuple(saved.start(CONFIG, saved.load_encoder())[0].map for saved in halves)


def test_how_one_map_lies_in_the_other_is_found(halves):
    joint = find_joint(*graphs(halves), with_scale=True)
    distance, turn_deg = pose_error(joint.alignment.T_target_source, T_A_B)
    assert distance < 0.03 and turn_deg < 0.5
    assert joint.alignment.scale == pytest.approx(1.0, abs=0.01)
    assert len(joint.landmarks_a) == len(set(joint.landmarks_a.tolist())) > 30


def test_another_unit_is_found_and_undone(halves):
    a, b = graphs(halves)
    b.rescale(0.4)
    b.landmarks.seen_inv_depth /= 0.4
    joint = find_joint(a, b, with_scale=True)
    assert joint.alignment.scale == pytest.approx(2.5, rel=0.01)
    count, landmarks = len(b), len(b.landmarks)
    before = len(a), len(a.landmarks)
    add_map(a, b, joint)
    assert (len(a), len(a.landmarks)) == (before[0] + count, before[1] + landmarks)
    distance, turn_deg = pose_error(a.T_map_cam[before[0]],
                                    T_A_B @ graphs(halves)[1].T_map_cam[0])
    assert distance < 0.03 and turn_deg < 0.5
    # What a sensor measured is in the unit of the map.
    table = a.landmarks
    rows = np.flatnonzero((table.seen_keyframe >= before[0]) & np.isfinite(table.seen_inv_depth)
                          & table.has_point[table.seen_landmark])
    depth = np.concatenate([a.depths(k, table.seen_landmark[rows[table.seen_keyframe[rows] == k]])
                            for k in np.unique(table.seen_keyframe[rows])])
    assert np.median(1 / table.seen_inv_depth[rows]) == pytest.approx(np.median(depth), rel=0.05)
    # What both saw is one landmark now, seen by keyframes of both.
    seen = [set(table.seen_keyframe[table.seen_landmark == id_] >= before[0])
            for id_ in joint.landmarks_a[:20]]
    assert all(sides == {True, False} for sides in seen)
    assert [k.id for k in a.keyframes] == list(range(len(a)))


def test_the_merged_map_has_all_of_both(halves, frames):
    merged = merge_maps(*halves)
    truth = {f.stamp_ns: f.T_map_cam for f in frames}
    trajectory = merged.scene.trajectory
    both = np.array([truth[stamp] for stamp in trajectory.stamps_ns.tolist()])
    assert set(trajectory.stamps_ns.tolist()) == set(truth)
    error = absolute_trajectory_error(
        Trajectory(np.arange(len(both)), trajectory.T_map_cam),
        Trajectory(np.arange(len(both)), both), 'se3')
    assert error.rmse < 0.02
    assert merged.scene.sessions == 2 and merged.scene.metres_per_unit == 1.0
    assert len(merged.scene.keyframes) == sum(saved.info.keyframes for saved in halves)


def test_a_map_without_a_scale_takes_that_of_the_other(halves, frames, tmp_path):
    config = PhotoConfig(encoder=replace(CONFIG.encoder, max_keypoints=800), memory=CONFIG.memory)
    bare = [replace(f, depth=None) for f in frames[14:]]
    photos = reconstruct_frames(bare, config)[0].save(tmp_path / 'photos')
    merged = merge_maps(photos, halves[0])  # only the second is in metres: it keeps its frame
    assert merged.moved == photos.path and merged.scene.metres_per_unit == 1.0
    assert abs(np.log(merged.alignment.scale)) > 0.2
    found = {e.source + str(e.stamp_ns): e.T_map_cam for e in merged.scene.estimates
             if e.T_map_cam is not None}
    truth = np.stack([f.T_map_cam for f in bare])
    ours = np.stack([found[f.source + str(f.stamp_ns)] for f in bare])
    assert np.linalg.norm(ours[:, :3, 3] - truth[:, :3, 3], axis=1).max() < 0.06


def test_images_move_with_the_nearest_keyframe():
    before = np.stack([se3_exp(np.r_[k, 0, 0, 0, 0.1 * k, 0]) for k in range(3)])
    move, scale = se3_exp(np.r_[5.0, 1, 2, 0.3, 0.2, 0.1]), 2.5
    after = before.copy()
    after[:, :3, 3] *= scale
    after = move @ after
    image = se3_exp(np.r_[1.2, 0.1, 0, 0, 0.1, 0])
    camera = Camera.from_fov(70.0, (64, 48))
    entries = [{'file': 'a.png', 'stamp_ns': 7, 'status': 'TRACKING', 'T_map_cam': image.tolist(),
                'camera': camera},
               {'file': 'b.png', 'stamp_ns': 8, 'status': 'LOST', 'T_map_cam': None,
                'camera': camera}]
    found, lost = moved_images(entries, before, after, 1.0, scale)
    image[:3, 3] *= scale
    np.testing.assert_allclose(found.T_map_cam, move @ image, atol=1e-12)
    assert (found.source, found.stamp_ns, lost.T_map_cam) == ('a.png', 7, None)
    assert found.camera == camera
    # When keyframes move apart, an image stays with the nearest one.
    after[0] = np.eye(4)
    np.testing.assert_allclose(moved_images(entries, before, after, 1.0, scale)[0].T_map_cam,
                               found.T_map_cam, atol=1e-12)


def test_the_memory_keeps_its_size_and_finds_views_of_both(halves, frames, tmp_path, capsys):
    out = tmp_path / 'both'
    assert main(['merge', str(halves[0].path), str(halves[1].path), '--out', str(out),
                 '--json']) == 0
    summary = json.loads(capsys.readouterr().out)
    sizes = {saved.info.files['memory.safetensors']['bytes'] for saved in halves}
    assert sizes == {summary['memory_bytes']}
    localizer = load_map(out).localizer()
    for frame in (frames[3], frames[20], frames[37]):
        estimate = localizer.localize(replace(frame, depth=None))
        distance, turn_deg = pose_error(estimate.T_map_cam, frame.T_map_cam)
        assert distance < 0.05 and turn_deg < 1.0
    # It is a map like any other: a walk goes on with it.
    again = map_frames(frames[:6], CONFIG, into=load_map(out))
    assert again.scene.sessions == 3


def test_maps_of_different_places_are_refused(halves, room_camera, tmp_path):
    room = Room.generate(31)
    elsewhere = list(render_walk(room, room_camera, room.walk(10, seed=2, fps=4.0), fps=4.0))
    other = mapped(elsewhere, tmp_path / 'other')
    with pytest.raises(MapError, match='maps that show the same place'):
        merge_maps(halves[0], other)


def test_a_map_without_its_keyframes_is_refused(halves, tmp_path):
    merged = merge_maps(*halves)
    bare = save_map(tmp_path / 'bare', replace(merged.scene, graph=None), merged.writer,
                    merged.encoder, merged.config)
    with pytest.raises(MapError, match='keyframes'):
        merge_maps(halves[0], bare)
