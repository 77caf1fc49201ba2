"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import cv2

from feedforward_recon.session.map_folder import load_map

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'


def run(name, *arguments):
    done = subprocess.run([sys.executable, EXAMPLES / f'{name}.py', *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_walk_is_mapped_and_a_camera_found_in_it(walk_folder, tmp_path):
    lines = run('map_and_localize', walk_folder, tmp_path / 'map')
    assert sum('TRACKING' in line for line in lines[:15]) == 15
    assert lines[15].startswith('images/015.png: TRACKING')
    assert load_map(tmp_path / 'map').info.images == 15

    video = cv2.VideoWriter(str(tmp_path / 'walk.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10,
                            (320, 240))
    for index in (0, 7, 15):
        video.write(cv2.imread(str(walk_folder / 'images' / f'{index:03d}.png')))
    video.release()
    lines = run('follow_camera', tmp_path / 'map', tmp_path / 'walk.avi')
    assert [line.split()[0] for line in lines] == ['TRACKING'] * 3
