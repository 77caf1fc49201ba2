"""The benchmark page is its results, and the peer we compare with is not broken by us."""

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.scoring import extrapolation_split, interleaved_split
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error


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
