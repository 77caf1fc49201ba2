"""Pose accuracy on shuffled windows: its scores, how windows are drawn, and what refines poses."""

import json
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from benchmarks import pose_accuracy
from benchmarks.covisible_windows import APART_DEG, covisible, drawn_windows
from benchmarks.pose_accuracy import GUESS, NETWORK, REFINED, SINGLE, Answer, Errors, relative
from benchmarks.window_refinement import refined_poses, shared_tracks
from feedforward_recon.geometry.transforms import se3_exp, so3_exp
from feedforward_recon.reconstruction.shots import shot_of
from feedforward_recon.types import Frame, Prediction


def turned(degrees, place=(0, 0, 0)):
    """A pose that looks so far to the right."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = so3_exp(np.deg2rad([0.0, degrees, 0.0])), place
    return T


def frames_at(poses):
    image = np.zeros((8, 8, 3), np.uint8)
    return [Frame(index, image, T_map_cam=T) for index, T in enumerate(poses)]


def row_of(poses, T_j_i):
    errors = Errors()
    errors.add(frames_at(poses), Answer(T_j_i))
    return errors.row()


POSES = np.stack([turned(0), turned(10, (1, 0, 0)), turned(20, (2, 0, 0))])


@dataclass
class Oracle:
    """A network that knows the frames it is shown."""

    frames: list

    def predict(self, images, K=None):
        shown = [next(f for f in self.frames if f.image is image) for image in images]
        first = np.linalg.inv(shown[0].T_map_cam)
        T = np.stack([first @ f.T_map_cam for f in shown])
        T[:, :3, 3] *= 7.0  # in a unit of its own
        depth = np.stack([7.0 * f.depth for f in shown])
        K = np.stack([f.camera.K for f in shown])
        return Prediction(T, K, depth, np.ones_like(depth)), None


@pytest.fixture(scope='module')
def window(room_walk):
    """Eight views of a room in any order."""
    overlap = covisible(np.stack([frame.T_map_cam for frame in room_walk]))
    chosen, = drawn_windows(overlap, 8, 1, np.random.default_rng(0))
    return [room_walk[index] for index in chosen]


# -- scores -------------------------------------------------------------------------------------

def test_an_oracle_has_all_points_and_images_one_by_one_have_depth_alone(window, encoder):
    systems = pose_accuracy.Systems(Oracle(window), encoder)
    rows = pose_accuracy.rows_of([window], systems)
    oracle = rows[NETWORK]
    assert [oracle[key] for key in ('auc30', 'rra15', 'rta15')] == pytest.approx([1, 1, 1],
                                                                                abs=1e-5)
    assert oracle['abs_rel'] == pytest.approx(0, abs=1e-5)
    assert rows[REFINED]['auc30'] > 0.97
    assert rows[SINGLE]['auc30'] == rows[SINGLE]['rta15'] == 0
    assert rows[SINGLE]['abs_rel'] == pytest.approx(0, abs=1e-5)
    assert rows[GUESS]['auc30'] < 0.5 < rows[pose_accuracy.FULL]['auc30']
    assert rows[pose_accuracy.FULL]['abs_rel'] is None


def test_still_turns_as_far_wrong_as_the_cameras_turn_and_has_no_direction():
    still = row_of(POSES, np.stack([np.eye(4)] * 3))
    assert still == {'auc30': 0, 'rra15': pytest.approx(2 / 3), 'rta15': 0, 'abs_rel': None,
                     'pairs': 3}


@pytest.mark.parametrize(('wrong_deg', 'area', 'within'), [
    (0, 1.0, 1), (6, 0.8, 1), (15.1, 1 - 15.1 / 30, 0), (31, 0.0, 0)])
def test_known_areas(wrong_deg, area, within):
    R = turned(wrong_deg)
    turns = row_of(POSES, relative(POSES) @ R)  # a turn about the centre of i
    assert turns['auc30'] == pytest.approx(area, abs=1e-6)
    assert (turns['rra15'], turns['rta15']) == (within, 1)
    straight = np.stack([np.eye(4), turned(0, (0, 0, 1))])
    said = relative(straight)
    said[0, :3, 3] = R[:3, :3] @ said[0, :3, 3]
    directions = row_of(straight, said)
    assert directions['auc30'] == pytest.approx(area, abs=1e-6)
    assert (directions['rra15'], directions['rta15']) == (1, within)


def test_a_pair_without_an_answer_counts_and_one_without_a_baseline_does_not():
    poses = np.stack([turned(0), turned(3, (0.019, 0, 0)), turned(0, (1, 0, 0))])
    said = relative(poses)
    said[0] = np.nan
    assert row_of(poses, said)['auc30'] == pytest.approx(1)
    said[1] = np.nan
    row = row_of(poses, said)
    assert (row['pairs'], row['auc30'], row['rra15'], row['rta15']) == (
        2, pytest.approx(0.5), 0.5, 0.5)


def test_the_best_constant_is_the_way_the_camera_goes(window, encoder):
    frames = [replace(frame, T_map_cam=turned(0, (0, 0, -index)))
              for index, frame in enumerate(window)]
    row = pose_accuracy.rows_of([frames], pose_accuracy.Systems(Oracle(window), encoder))[GUESS]
    assert (row['guess'], row['auc30']) == ('-z', pytest.approx(1, abs=1e-5))


# -- windows ------------------------------------------------------------------------------------

def test_views_overlap_when_they_are_near_and_look_nearly_the_same_way():
    yaw = np.array([0.0, 3.0, 6.0, 40.0, 47.0])
    overlap = covisible(np.stack([turned(angle) for angle in yaw]))
    apart = np.abs(np.subtract.outer(yaw, yaw))
    np.testing.assert_array_equal(overlap, (apart >= APART_DEG[0]) & (apart <= APART_DEG[1]))
    far = np.stack([turned(10 * (index % 2), (index, 0, 0)) for index in range(40)])
    near = np.argwhere(covisible(far))
    assert 0 < np.abs(near[:, 0] - near[:, 1]).max() <= 8


def test_views_that_turn_by_nothing_overlap_with_those_beside_them():
    ahead = covisible(np.stack([turned(0, (0, 0, index)) for index in range(12)]))
    order = np.arange(12)
    np.testing.assert_array_equal(ahead, np.abs(np.subtract.outer(order, order)) == 1)


def test_windows_are_connected_disjoint_while_possible_and_the_same_each_time():
    poses = np.stack([turned(9 * index) for index in range(40)])
    overlap = covisible(poses)
    windows = drawn_windows(overlap, 8, 20, np.random.default_rng(3))
    again = drawn_windows(overlap, 8, 20, np.random.default_rng(3))
    np.testing.assert_array_equal(windows, again)
    assert len({frozenset(window) for window in windows}) == len(windows) == 20
    left = np.ones(40, bool)
    for window in windows:
        assert len(set(window)) == 8
        assert overlap[np.ix_(window, window)].any(1).all()
        _, part = connected_components(overlap[np.ix_(left, left)], directed=False)
        assert left[window].all() or np.bincount(part).max(initial=0) < 8
        left[window] = False
    assert any(np.any(np.diff(window) < 0) for window in windows), 'in order of time'


def test_images_that_connect_to_too_few_others_are_in_no_window():
    overlap = np.zeros((11, 11), bool)
    for part in (range(3), range(3, 11)):
        overlap[np.ix_(part, part)] = True
    windows = drawn_windows(overlap, 8, 4, np.random.default_rng(0))
    assert [sorted(window) for window in windows] == [list(range(3, 11))]
    assert drawn_windows(overlap[:8, :8], 8, 4, np.random.default_rng(0)) == []


# -- refinement ---------------------------------------------------------------------------------

@pytest.mark.parametrize(('degrees', 'metres'), [(2, 0.05), (20, 0.4)])
def test_refinement_improves_wrong_poses(window, encoder, degrees, metres):
    shots = [shot_of(frame, frame.camera, encoder, 800_000) for frame in window]
    rng, true = np.random.default_rng(0), np.stack([frame.T_map_cam for frame in window])
    noise = rng.normal(size=(8, 6)) / np.sqrt(3) * np.r_[[metres] * 3, [np.deg2rad(degrees)] * 3]
    start = true @ se3_exp(noise)
    refined = refined_poses(shots, shared_tracks(shots, encoder), start)
    before, after = (np.median(pose_accuracy.pair_errors_deg(relative(T), true), 1)
                     for T in (start, refined))
    assert np.all(8 * after < before), (before, after)


def test_images_that_share_nothing_stay_where_they_are(window, encoder):
    noise = np.random.default_rng(0).integers(0, 255, (4, 240, 320, 3), dtype=np.uint8)
    shots = [shot_of(replace(frame, image=image), frame.camera, encoder, 800_000)
             for frame, image in zip(window, noise, strict=False)]
    start = np.stack([frame.T_map_cam for frame in window[:4]])
    np.testing.assert_array_equal(
        refined_poses(shots, shared_tracks(shots, encoder), start), start)


# -- command ------------------------------------------------------------------------------------

def test_one_json_document_and_nothing_else(walk_folder, capsys, monkeypatch):
    monkeypatch.setattr(pose_accuracy, 'write_result', pytest.fail)
    assert pose_accuracy.main(['--data', str(walk_folder), '--windows', '1', '--json']) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document['model'], document['views'], document['windows']) == ('tiny', 8, 1)
    rows = document['rows']
    assert [key.split(' | ')[0] for key in rows] == [str(walk_folder)] * len(rows)
    systems = [key.split(' | ')[1] for key in rows]
    assert {NETWORK, REFINED, SINGLE, GUESS, pose_accuracy.GUESS_REFINED, pose_accuracy.SMALL,
            pose_accuracy.FULL} == set(systems)
    for row in rows.values():
        assert all(0 <= row[key] <= 1 for key in ('auc30', 'rra15', 'rta15'))
    assert rows[f'{walk_folder} | {NETWORK}']['abs_rel'] > 0


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Data with the sets ``plain`` without poses or cameras, ``bare`` without poses, ``few``."""
    monkeypatch.setenv('FFRECON_DATA', str(tmp_path))
    for name, count, pose in (('plain', 9, None), ('bare', 9, None), ('few', 7, np.eye(4))):
        (tmp_path / name).mkdir()
        entries = []
        for index in range(count):
            cv2.imwrite(str(tmp_path / name / f'{index}.png'), np.zeros((48, 64, 3), np.uint8))
            entries.append({'file': f'{index}.png', 'K': [[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1]],
                            'T_world_camera': None if pose is None else pose.tolist()})
        if name != 'plain':
            (tmp_path / name / 'cameras.json').write_text(json.dumps({'frames': entries}))
    return tmp_path


@pytest.mark.parametrize(('arguments', 'said'), [
    (['--data', 'nowhere'], "expected a folder or a set of bare, few, found 'nowhere'; choose"),
    (['--data', 'plain'], 'plain: expected poses and intrinsics in cameras.json, found none; '),
    (['--data', 'bare'], 'expected images with T_world_camera and K, found none; choose'),
    (['--data', 'few'], 'expected at least 8 images of one size that overlap, found 7 of one'),
    (['--data', 'few', '--model', 'tini'], "name of a model, found 'tini'; did you mean tiny?")])
def test_what_cannot_be_measured_is_said_in_a_sentence(sets, capsys, arguments, said):
    assert pose_accuracy.main([*arguments, '--json']) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert said in captured.err and captured.err.count('\n') == 1


def test_a_number_of_windows_is_at_least_one(capsys):
    with pytest.raises(SystemExit) as stopped:
        pose_accuracy.main(['--windows', '0'])
    assert stopped.value.code == 2
    assert "expected a number of at least 1, found '0'" in capsys.readouterr().err


def test_only_a_run_of_what_ships_writes_the_result(monkeypatch, capsys):
    written = []
    monkeypatch.setattr(pose_accuracy, 'write_result', lambda *result: written.append(result))
    row = {'auc30': 0.5, 'rra15': 0.5, 'rta15': 0.5, 'abs_rel': None, 'guess': '+x'}
    monkeypatch.setattr(pose_accuracy, 'run', lambda **asked: iter([('a | b', row)]))
    pose_accuracy.main(['--windows', '2'])
    pose_accuracy.main(['--json'])
    assert written == []
    capsys.readouterr()
    pose_accuracy.main([])
    assert written == [('pose_accuracy', {'a | b': row})]
    assert capsys.readouterr().out.startswith('a | b (+x)')
