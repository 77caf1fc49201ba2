"""Cameras held in any way, parts of a collection that are joined, and parts that are not."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from test_photo_parts import CIRCLE, error_of, scene, shot, structure_of
from test_reconstruction import CONFIG, ENCODER, SETTINGS, as_files, views
from test_reconstruction import error_of as error_of_run

from feedforward_recon.cli import main
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, se3_exp
from feedforward_recon.reconstruction import completion
from feedforward_recon.reconstruction.comparisons import Comparisons, compared
from feedforward_recon.reconstruction.pairs import CompactPairs, FeatureMatches
from feedforward_recon.reconstruction.parts import PhotoSet
from feedforward_recon.reconstruction.pipeline import assembled
from feedforward_recon.reconstruction.refinement import Structure, with_tracks
from feedforward_recon.reconstruction.registration import (
    placed_by_points,
    placed_together,
    with_placed,
)
from feedforward_recon.reconstruction.shots import ROLLS, seen_rolled, shot_of
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.types import Features, Frame

assert scene  # a fixture
SQUARE = Camera.from_fov(60.0, (240, 240))
SIDE = np.arange(CIRCLE) > 5  # images of a part of its own


@pytest.fixture(scope='module')
def upright():
    """Views of a room by a square camera."""
    return views(5, camera=SQUARE)


def held(frame, eighths):
    """The frame, taken by a camera that was rolled to the right."""
    turn = cv2.getRotationMatrix2D((119.5, 119.5), -45.0 * eighths, 1.0)
    image = cv2.warpAffine(frame.image, turn, SQUARE.size_wh)
    T_cam_held = se3_exp(np.r_[0, 0, 0, 0, 0, -np.pi / 4 * eighths])
    return Frame(frame.stamp_ns, image, camera=SQUARE, T_map_cam=frame.T_map_cam @ T_cam_held,
                 source=frame.source)


def shots_of(frames):
    return [shot_of(frame, frame.camera, ENCODER, 10**6) for frame in frames]


@pytest.mark.parametrize('roll', range(1, ROLLS))
def test_an_image_rolled_back_looks_as_before(upright, roll):
    """Where it is not cut off: in the middle."""
    plain, turned = shots_of([upright[0], held(upright[0], roll)])
    middle = np.linalg.norm(turned.features.keypoints - 119.5, axis=1) < 90
    back = cv2.getRotationMatrix2D((119.5, 119.5), 45.0 * roll, 1.0)
    at = turned.features.keypoints @ back[:, :2].T + back[:, 2]
    before = ENCODER.describe(upright[0].image, at).descriptors[middle]
    rolled_back = seen_rolled(turned, ENCODER, roll).descriptors[middle]
    alike = (before * rolled_back).sum(1)
    assert np.median(alike) > 0.8
    if 1 < roll < ROLLS - 1:
        assert np.median((before * turned.features.descriptors[middle]).sum(1)) < 0.6
    assert plain.features.descriptors.shape[1] == rolled_back.shape[1]


def test_a_camera_may_be_held_in_any_way(upright):
    """Four of the views on their side, four upside down, some between."""
    frames = [held(frame, eighths) for frame, eighths in
              zip(upright, (0, 0, 0, 0, 0, 0, 2, 2, 6, 6, 4, 4, 3, 5), strict=True)]
    run, *others = reconstruct_frames(frames, CONFIG)
    assert not others and len(run.scene.trajectory) == len(frames)
    rmse, turn_deg = error_of_run(run, frames)
    assert rmse < 0.02 and turn_deg < 0.3


@pytest.mark.parametrize('where', [0, 3, 6])
def test_only_what_falls_apart_is_rolled(upright, monkeypatch, where):
    frames = [held(frame, 2) if k == where else frame for k, frame in enumerate(upright[:7])]
    shots, rolled = shots_of(frames), []
    decoder = CompactPairs(shots, ENCODER)
    look = decoder.rolled
    monkeypatch.setattr(decoder, 'rolled', lambda image: (rolled.append(image), look(image))[1])
    done = compared(shots, decoder, CONFIG.reconstruction)
    assert rolled == [where]
    assert sum(where in edge for edge in done.pairs) > 2
    plain = as_they_are(shots)
    assert not any(where in edge for edge in plain.pairs)
    assert len(assembled(PhotoSet(shots, plain, CONFIG.reconstruction))) == 1
    assert any(where in edge for edge in plain.pairs)  # it was rolled to be placed


def as_they_are(shots):
    """All images compared without rolling any."""
    descriptors = np.stack([one.features.global_descriptor for one in shots])
    plain = Comparisons(CompactPairs(shots, ENCODER), descriptors)
    plain.match(np.array([(i, j) for j in range(len(shots)) for i in range(j)]))
    return plain


def test_pairs_found_before_are_kept_when_an_image_is_rolled(upright):
    shots = shots_of(upright[:5])
    done = compared(shots, CompactPairs(shots, ENCODER), CONFIG.reconstruction)
    pairs, matches = dict(done.pairs), dict(done.matches)
    done.roll(np.array([0, 1]))
    assert done.pairs == pairs and set(done.matches) <= set(matches)
    assert all(edge in done.matches for edge in pairs)
    edges = np.array([(0, 1), (2, 1), (0, 4)])
    np.testing.assert_allclose(done.similar.of(edges), done.similar.of(edges[:, ::-1]), rtol=1e-6)


def in_another_frame(structure: Structure, unit, T) -> Structure:
    """The structure, moved and in another unit."""
    poses = structure.T_map_cam.copy()
    poses[:, :3, 3] *= unit
    points = unit * structure.points @ T[:3, :3].T + T[:3, 3]
    return Structure(T @ poses, structure.cameras, structure.tracks, points, structure.error_px,
                     structure.angle_deg)


def two_parts(scene):
    """What the images of both parts see by themselves; the second in a frame of its own."""
    _, poses, _, _ = scene
    both = structure_of(scene, poses)
    first, second = (with_tracks(both, both.tracks.select(keep[both.tracks.image]))
                     for keep in (~SIDE, SIDE))
    return first, in_another_frame(second, 2.3, se3_exp(np.r_[4, 0, 1, 0.5, 1.0, -0.3]))


def spoiled(matches, seed, right=0.12):
    """Matches of which a few are right."""
    rng = np.random.default_rng(seed)
    wrong = rng.uniform(size=len(matches)) > right
    other = matches.feature_j.copy()
    other[wrong] = rng.permutation(other[wrong])
    return FeatureMatches(matches.feature_i, other, np.ones(len(matches), bool))


def test_a_part_is_placed_as_a_whole_by_few_right_matches(scene):
    shots, poses, matches, _ = scene
    first, second = two_parts(scene)
    few = {edge: spoiled(found, k) for k, (edge, found) in enumerate(matches.items())
           if SIDE[edge[0]] != SIDE[edge[1]]}
    found = placed_together(first, second, shots, ~SIDE, SIDE, few, seed=0)
    assert sorted(found) == np.flatnonzero(SIDE).tolist()
    T = poses.copy()
    T[SIDE] = np.stack([found[image] for image in np.flatnonzero(SIDE)])
    for image in np.flatnonzero(SIDE):
        off = inverse(poses[image]) @ T[image]
        assert np.linalg.norm(off[:3, 3]) < 0.1
    assert error_of(T, poses, np.arange(CIRCLE))[1] < 1.0


def test_a_part_of_another_scene_is_not_placed(scene):
    shots, _, matches, _ = scene
    first, second = two_parts(scene)
    wrong = {edge: spoiled(found, k, right=0.0) for k, (edge, found) in enumerate(matches.items())
             if SIDE[edge[0]] != SIDE[edge[1]]}
    assert placed_together(first, second, shots, ~SIDE, SIDE, wrong, seed=0) == {}


def with_copies(one):
    """Each feature twice, half a pixel apart."""
    features = one.features
    return shot(Features(np.concatenate([features.keypoints, features.keypoints + 0.5]),
                         *(np.concatenate([column, column]) for column in
                           (features.descriptors, features.confidence)),
                         features.global_descriptor))


def copied(both, side, count):
    """The matches of an image, and those of the copies of its features."""
    row, column = both.feature_i, both.feature_j
    of_image, other = (row, column) if side == 0 else (column, row)
    doubled = [np.concatenate([of_image % count, of_image % count + count]),
               np.concatenate([other, other])]
    return FeatureMatches(*(doubled if side == 0 else doubled[::-1]),
                          np.ones(2 * len(row), bool))


def test_an_image_that_is_placed_moves_no_point(scene):
    shots, poses, matches, _ = scene
    registered = np.arange(CIRCLE) != 5
    structure = structure_of(scene, poses)
    structure = with_tracks(structure, structure.tracks.select(structure.tracks.image != 5))
    shots = [*shots[:5], with_copies(shots[5]), *shots[6:]]
    matches = {edge: CompactPairs(shots, ENCODER).match(*edge) for edge in matches if 5 in edge}
    copies = {edge: copied(both, edge.index(5), len(shots[5].features) // 2)
              for edge, both in matches.items()}
    found = placed_by_points(structure, shots, registered, ~registered, copies, seed=0)
    larger = with_placed(structure, found, shots)
    np.testing.assert_array_equal(larger.points, structure.points)
    new = larger.tracks.image == 5
    assert new.sum() == len(found[5].feature) > 20 and len(larger.error_px) == len(larger.tracks)
    for column in (larger.tracks.feature[new], larger.tracks.point[new]):
        assert len(np.unique(column)) == new.sum()  # each feature shows one point, and once
    assert np.median(larger.error_px[new]) < 1.0
    np.testing.assert_array_equal(larger.tracks.px[new],
                                  shots[5].features.keypoints[larger.tracks.feature[new]])


def test_parts_that_pairs_do_not_connect_become_one(upright, monkeypatch):
    """No pair leads from one half to the other; their matches are known, and points agree."""
    shots = shots_of(upright)
    comparisons = compared(shots, CompactPairs(shots, ENCODER), CONFIG.reconstruction)
    monkeypatch.setattr(comparisons, 'roll', lambda images: None)
    monkeypatch.setattr(comparisons, 'match', lambda wanted: 0)
    order = np.argsort([frame.stamp_ns for frame in upright])
    half = np.isin(np.arange(len(shots)), order[:8])
    for edge in [edge for edge in comparisons.pairs if half[edge[0]] != half[edge[1]]]:
        del comparisons.pairs[edge]
    photos = PhotoSet(shots, comparisons, CONFIG.reconstruction)
    monkeypatch.setattr(completion, 'placed_by_points', lambda *_: {})
    whole = assembled(photos)
    assert len(whole) == 1 and whole[0].registered.all()
    wrong = se3_exp(np.r_[5, 0, 0, 0, 0.5, 0])
    for nowhere in ({}, {image: wrong @ upright[image].T_map_cam
                         for image in np.flatnonzero(~half).tolist()}):
        monkeypatch.setattr(completion, 'placed_together', lambda *_, nowhere=nowhere: nowhere)
        parts = assembled(photos)
        assert [int(part.registered.sum()) for part in parts] == [8, 6]
        assert not (parts[0].registered & parts[1].registered).any()


def test_what_nothing_connects_is_a_map_beside(tmp_path, capsys):
    folder = tmp_path / 'photos'
    folder.mkdir()
    as_files([*views(5, 7), *views(77, 5)], folder)
    (tmp_path / 'map-2').mkdir()  # somebody else's
    assert main(['reconstruct', str(folder), *SETTINGS, '--out', str(tmp_path / 'map'),
                 '--json']) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary['frames'] == 12 and len(summary['unregistered']['NO_OVERLAP']) == 5
    assert summary['others'] == {str(tmp_path / 'map-3'): 5}
    assert not any((tmp_path / 'map-2').iterdir())
    assert load_map(tmp_path / 'map-3').info.images == 5
    assert main(['localize', str(tmp_path / 'map-3'), str(folder), '--json']) == 0
    found = {answer['file'] for answer in json.loads(capsys.readouterr().out)
             if answer['T_map_cam'] is not None}
    assert found == {f'77_{index:02d}.png' for index in range(5)}
