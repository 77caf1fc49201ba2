"""Finding held-out images in a memory: both splits, and what each half of the memory does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import KITCHEN, data_root, load_frames, true_trajectory
from benchmarks.ours import Answerer, alignment_to, map_frames
from benchmarks.scoring import extrapolation_split, interleaved_split, localisation_entry
from feedforward_recon.config.schema import MapperConfig, MemoryConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.memory.keys import TABLES
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

# For at least 1000 images of other places: what the sets lack is rendered.
OTHER_ROOMS, VIEWS = range(50, 57), 30
ROOM_CAMERA = Camera.from_fov(65.0, (640, 480))
# Of the bytes, for the network beside slots: more costs slots, less knows too little.
NETWORK_SHARE, CELL_BYTES = 0.29, 7
GUESSED_FOV_DEG = 60.0  # of photos without a camera


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Given poses (the default and others at equal bytes), then our own poses."""
    frames = load_frames(KITCHEN)
    for split, (mapped, query) in {'interleaved': interleaved_split(len(frames)),
                                   'extrapolation': extrapolation_split(len(frames))}.items():
        known, unknown = [frames[i] for i in mapped], [frames[i] for i in query]
        for name, config in variants().items():
            yield f'{KITCHEN} {split} | {name}', given_poses(known, unknown, config)
        yield f'{KITCHEN} {split} | default, own RGB-D poses', own_poses(known, unknown)


def variants() -> dict[str, MapperConfig]:
    """The default memory, and others at the same bytes."""
    default = MapperConfig()
    others = memories(nbytes(default.memory))
    return {'default': default, **{name: dataclasses.replace(default, memory=others[name])
                                   for name in ('hybrid', 'network only')}}


def memories(budget: int) -> dict[str, MemoryConfig]:
    """Slots alone, slots and a network, and the network alone with all its tables."""
    default = MapperConfig().memory
    cells = int(NETWORK_SHARE * budget) // (default.tables * CELL_BYTES)
    return {'slots only': _most(lambda n: dataclasses.replace(default, slots=n, cells=0), budget),
            'hybrid': _most(lambda n: dataclasses.replace(default, slots=n, cells=cells), budget),
            'network only': _most(lambda n: dataclasses.replace(default, slots=0, tables=TABLES,
                                                                cells=n), budget)}


def nbytes(memory: MemoryConfig) -> int:
    """Bytes of a memory, known before anything is written."""
    return MemoryWriter(memory, CompactEncoder.load().dim).snapshot().nbytes


def _most(memory: Callable[[int], MemoryConfig], budget: int) -> MemoryConfig:
    """The memory with the largest number that fits into a budget of bytes."""
    none, one = nbytes(memory(0)), nbytes(memory(1))
    return memory((budget - none) // (one - none))


def given_poses(known: list[Frame], unknown: list[Frame], config: MapperConfig) -> dict[str, Any]:
    """Map with the true poses, localise the rest."""
    mapped = map_frames(known, config, given_poses=True)
    return localisation_entry(Answerer(mapped, config), unknown, mapped.memory.nbytes,
                              mapped.mapping)


def own_poses(known: list[Frame], unknown: list[Frame]) -> dict[str, Any]:
    """Map without poses; the answers are moved to the ground truth by one rigid transform."""
    mapped = map_frames(known)
    to_truth = alignment_to(true_trajectory(known), mapped.scene.trajectory, with_scale=False)
    return localisation_entry(Answerer(mapped, to_truth=to_truth), unknown, mapped.memory.nbytes,
                              mapped.mapping)


def run_wrong_places() -> Iterator[tuple[str, dict[str, Any]]]:
    """Images of other scenes against the memory of the kitchen."""
    frames = load_frames(KITCHEN)
    known = [frames[i] for i in interleaved_split(len(frames))[0]]
    answer = Answerer(map_frames(known, given_poses=True))
    strangers = other_scenes()
    accepted = [frame.source for frame in strangers if answer(frame) is not None]
    yield f'{KITCHEN} | other scenes', {'images': len(strangers), 'accepted': len(accepted),
                                        'which': accepted}


def other_scenes() -> list[Frame]:
    """Images of every other set that has cameras, photos without, and views of rendered rooms."""
    options = SourceOptions(mixed_sizes=True)
    folders = [folder for folder in sorted(data_root().iterdir()) if folder.name != KITCHEN]
    posed = [frame for folder in folders if (folder / 'cameras.json').exists()
             for frame in open_source(folder, options) if frame.camera is not None]
    photos = [dataclasses.replace(frame, camera=_guessed(frame)) for folder in folders
              if not (folder / 'cameras.json').exists() and folder.is_dir()
              for frame in open_source(folder, options)]
    rooms = [Room.generate(seed) for seed in OTHER_ROOMS]
    rendered = [frame for room in rooms
                for frame in render_walk(room, ROOM_CAMERA, room.walk(VIEWS, seed=0, fps=1.0))]
    return posed + photos + rendered


def _guessed(frame: Frame) -> Camera:
    height, width = frame.image.shape[:2]
    return Camera.from_fov(GUESSED_FOV_DEG, (width, height))
