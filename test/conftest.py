"""Fixtures shared by all tests."""

import json
import os
from pathlib import Path

import pytest

from feedforward_recon.geometry.camera import Camera

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def data_dir():
    """Folder of the real image sets: FFRECON_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get('FFRECON_DATA', REPOSITORY.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip(f'data: no real image sets at {folder}; set FFRECON_DATA')
    return folder


@pytest.fixture(scope='session')
def room_camera():
    """A small camera for synthetic views."""
    return Camera.from_fov(70.0, (160, 120))


@pytest.fixture(scope='session')
def room_frames(room_camera):
    """Twelve frames of a walk through a synthetic room, with depth and exact poses."""
    from feedforward_recon.synthetic import Room, render_walk

    room = Room.generate(5)
    return list(render_walk(room, room_camera, room.walk(12, seed=1)))


@pytest.fixture(scope='session')
def walk_folder(tmp_path_factory):
    """Thirty RGB-D frames of 320x240 with exact poses, as a folder with cameras.json."""
    import cv2
    import numpy as np

    from feedforward_recon.synthetic import Room, render_walk

    folder, room = tmp_path_factory.mktemp('walk'), Room.generate(5)
    camera = Camera.from_fov(70.0, (320, 240))
    entries = []
    for index, frame in enumerate(render_walk(room, camera, room.walk(90, seed=1)[:30])):
        for name, pixels in (('images', frame.image[..., ::-1]),
                             ('depth', np.rint(1000 * frame.depth).astype(np.uint16))):
            (folder / name).mkdir(exist_ok=True)
            assert cv2.imwrite(str(folder / name / f'{index:03d}.png'), pixels)
        entries.append({'file': f'images/{index:03d}.png', 'depth': f'depth/{index:03d}.png',
                        'timestamp': frame.stamp_ns / 1e9, 'K': camera.K.tolist(),
                        'T_world_camera': frame.T_map_cam.tolist()})
    (folder / 'cameras.json').write_text(json.dumps({'frames': entries}))
    return folder
