"""Fixtures shared by all tests."""

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
