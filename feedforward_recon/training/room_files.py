"""Files of ``ffrecon-train views`` as sources of windows; only a few are in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.training.depth_source import DepthSource, DepthView
from feedforward_recon.training.room_views import HELD_OUT, TRAIN
from feedforward_recon.training.view_sources import ViewSource

HELD_OUT_ROOMS = 2
OPEN_ROOMS = 16  # 24 MB each; another one is read in a hundredth of the time of a step


@lru_cache(maxsize=OPEN_ROOMS)
def opened_room(file: Path) -> dict[str, NDArray]:
    """The arrays of a file, see ``RoomViews``; the last few are kept.

    Raises InputError for a file that cannot be read or lacks some of them.
    """
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in ('image', 'depth', 'K', 'T_world_cam')}
            if 'moving' in stored:
                arrays['moving'] = stored['moving']
            return arrays
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f'expected image, depth, K and T_world_cam in {file}, found {error}; '
                         'remove it and run `ffrecon-train views` again') from error


@dataclass(frozen=True)
class RoomFile:
    """The views of a room; files from before things moved have no ``moving``."""

    file: Path

    def __len__(self) -> int:
        """Number of views."""
        return len(opened_room(self.file)['K'])

    def view(self, index: int) -> DepthView:
        """See ``DepthViews``."""
        arrays = opened_room(self.file)
        image, depth = arrays['image'][index], arrays['depth'][index]
        height, width = depth.shape
        moving = None
        if 'moving' in arrays:
            moving = np.unpackbits(arrays['moving'][index], axis=-1, count=width).astype(bool)
        return DepthView(image, depth, Camera.from_matrix(arrays['K'][index], (width, height)),
                         arrays['T_world_cam'][index], moving)


def room_source(file: Path) -> DepthSource:
    """Windows of the room of a file."""
    return DepthSource(file.stem, RoomFile(file))


def room_sources(folder: Path) -> tuple[list[ViewSource], list[ViewSource]]:
    """Rooms of ``ffrecon-train views``: those to train on, and two of those held out.

    Raises InputError where there are none.
    """
    rooms: list[ViewSource] = [room_source(f) for f in sorted(folder.glob(f'{TRAIN}*.npz'))]
    if not rooms:
        raise InputError(f'expected {TRAIN}*.npz in {folder}, found none; run `ffrecon-train '
                         'views` first')
    held_out = sorted(folder.glob(f'{HELD_OUT}*.npz'))[:HELD_OUT_ROOMS]
    return rooms, [room_source(file) for file in held_out]
