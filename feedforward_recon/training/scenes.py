"""What a network is trained on, and what it is tested on meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from feedforward_recon.training.room_files import room_sources
from feedforward_recon.training.scene_folders import photo_sources
from feedforward_recon.training.validation import ValidationWindows
from feedforward_recon.training.windows import WindowStream


class TrainingScenes(NamedTuple):
    """stream: windows to train on. validation: of scenes that are held out."""

    stream: WindowStream
    validation: ValidationWindows


def open_scenes(photos: str, rooms: str, held_out: str, photo_share: float, seed: int
                ) -> TrainingScenes:
    """Scenes in a folder of photos and, unless it is '', in one of rooms.

    held_out: names of scenes of photos, separated by commas.
    """
    names = [name for name in held_out.split(',') if name]
    sources, kept = photo_sources(Path(photos), names)
    room, room_kept = room_sources(Path(rooms)) if rooms else ([], [])
    return TrainingScenes(WindowStream(sources, room, photo_share, seed),
                          ValidationWindows([*kept, *room_kept]))
