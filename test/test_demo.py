"""The demo in small: it passes on a short walk, and it can fail."""

import json

import cv2
import pytest

from feedforward_recon.cli import demo, main
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.training.rooms import FIRST_TRAINING_ROOM


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Folder and summary of a demo with fewer and smaller images."""
    folder = tmp_path_factory.mktemp('demo') / 'map'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {'CAMERA': Camera.from_fov(68.0, (320, 240)), 'FRAMES': 24,
                            'VIEWS': 6, 'OTHER_VIEWS': 4}.items():
            patch.setattr(demo, name, value)
        kept = []
        patch.setattr(demo, 'print_json', kept.append)
        code = main(['demo', '--out', str(folder), '--json'])
    return folder, code, kept[0]


def test_the_demo_keeps_its_promises(small):
    folder, code, summary = small
    assert (code, summary['passed']) == (0, True), summary
    assert summary['tracked'] == 24
    assert summary['error']['ate_rmse'] < 0.3 * summary['error']['straight_line_rmse']
    json.dumps(summary, allow_nan=False)
    for name in ('cloud.ply', 'trajectory.tum', 'poses.json', 'memory.safetensors'):
        assert (folder / name).stat().st_size > 0
    assert cv2.imread(str(folder / 'overview.png')).shape[1] >= 800


@pytest.mark.parametrize('worse', [
    {'error': None}, {'error': {'ate_rmse': 0.031}}, {'recall_5cm': 0.89},
    {'other_room_accepted': 1}])
def test_a_broken_promise_is_noticed(small, worse):
    _, _, summary = small
    assert all(kept for _, kept in demo._verdicts(summary))
    assert sum(not kept for _, kept in demo._verdicts({**summary, **worse})) == 1


def test_the_encoder_was_not_trained_on_the_rooms_of_the_demo():
    assert max(demo.ROOM_SEED, demo.OTHER_ROOM_SEED) < FIRST_TRAINING_ROOM


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capsys):
    assert main(['demo', '--out', str(tmp_path / 'demo')]) == 0
    assert 'FAIL' not in capsys.readouterr().out
