"""Folders of real scenes to train on; each may have another format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from feedforward_recon.errors import InputError
from feedforward_recon.training.colmap_scenes import colmap_model, read_colmap
from feedforward_recon.training.depth_source import DepthSource
from feedforward_recon.training.photo_source import PhotoSource
from feedforward_recon.training.posed import read_scene
from feedforward_recon.training.rgbd_scenes import (
    is_seven_scenes,
    is_tum,
    seven_scenes_views,
    tum_views,
)
from feedforward_recon.training.view_sources import ViewSource

FORMATS = ('cameras.json and tracks.npz, a COLMAP model (images, sparse/0), TUM RGB-D (rgb.txt) '
           'or 7-Scenes (seq-01)')


def photo_sources(folder: Path, held_out: Sequence[str]
                  ) -> tuple[list[ViewSource], list[ViewSource]]:
    """All scenes of a folder: those to train on, and those held out.

    Raises InputError for a folder without scenes, for names that are not there, and for scenes
    that cannot be used.
    """
    found = {place.name: reader for place in _folders_in(folder)
             if (reader := _reader_of(place)) is not None}
    names = list(found)
    if set(names) <= set(held_out):
        raise InputError(f'expected folders with {FORMATS} in {folder} to train on, found none; '
                         'give another folder')
    if unknown := sorted(set(held_out) - set(names)):
        raise InputError(f'expected scenes of {folder} to hold out, found {unknown}; choose of '
                         f'{names}')
    sources = {name: read(folder / name) for name, read in found.items()}
    return ([sources[name] for name in names if name not in held_out],
            [sources[name] for name in held_out])


def _folders_in(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob('*') if place.is_dir())


def _reader_of(folder: Path) -> Callable[[Path], ViewSource] | None:
    """What reads a scene; None where it has no format that is known."""
    if (folder / 'cameras.json').is_file():
        return lambda place: PhotoSource(place.name, read_scene(place))
    if colmap_model(folder) is not None:
        return lambda place: PhotoSource(place.name, read_colmap(place))
    if is_tum(folder):
        return lambda place: DepthSource(place.name, tum_views(place))
    if is_seven_scenes(folder):
        return lambda place: DepthSource(place.name, seven_scenes_views(place))
    return None
