"""Scenes to train the keys of the scene memory on: what was written, and what is asked later.

A scene is a set of described points in space, each seen in several images, and the same points
described in images that a worse moment would have given (``synthetic.hardships``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.synthetic.hardships import HARDSHIPS
from feedforward_recon.training.posed import read_scene
from feedforward_recon.training.rooms import FIRST_TRAINING_ROOM
from feedforward_recon.types import Frame

VIEWS, ROOM_FPS = 30, 2.0
SIZE_WH, FOV_DEG, NOISE = (640, 480), 65.0, 2.0
HARD_VERSIONS = 2  # of each image: two of the hardships, drawn anew for each
MOST_IMAGES = 40  # of a real scene; more are as many views of the same points


@dataclass(frozen=True)
class MemoryScene:
    """Descriptions of points in the images of a scene.

    descriptors float16 [N, D], points float32 [N, 3] in the world, view int32 [N] the image and
    hard bool [N]: described in a version of it that is hard.
    T_cam_world [V, 4, 4], focal_px [V] of the images.
    """

    descriptors: NDArray[np.float16]
    points: NDArray[np.float32]
    view: NDArray[np.int32]
    hard: NDArray[np.bool_]
    T_cam_world: NDArray[np.float64]
    focal_px: NDArray[np.float64]


def described(frames: Iterator[tuple[Frame, NDArray[np.floating], NDArray[np.floating]]],
              encoder: CompactEncoder, rng: np.random.Generator) -> MemoryScene:
    """A scene of frames with pixels [N, 2] of points and their depths [N]."""
    columns: dict[str, list[NDArray]] = {name: [] for name in
                                         ('descriptors', 'points', 'view', 'hard')}
    cameras: list[Camera] = []
    poses = []
    for index, (frame, pixels, depth) in enumerate(frames):
        assert frame.camera is not None and frame.T_map_cam is not None
        points = transform_points(frame.T_map_cam, frame.camera.unproject(pixels, depth))
        cameras.append(frame.camera)
        poses.append(inverse(frame.T_map_cam))
        kinds = rng.choice(sorted(HARDSHIPS), HARD_VERSIONS, replace=False)
        versions = [frame, *(HARDSHIPS[kind](frame, int(rng.integers(2**31))) for kind in kinds)]
        for number, version in enumerate(versions):
            shown, at = _shown(version, points)
            features = encoder.describe(version.image, at)
            columns['descriptors'].append(features.descriptors.astype(np.float16))
            columns['points'].append(points[shown].astype(np.float32))
            columns['view'].append(np.full(len(shown), index, np.int32))
            columns['hard'].append(np.full(len(shown), number > 0))
    return MemoryScene(**{name: np.concatenate(values) for name, values in columns.items()},
                       T_cam_world=np.stack(poses),
                       focal_px=np.array([camera.fx for camera in cameras]))


def _shown(frame: Frame, points: NDArray[np.floating]
           ) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """Rows of points [N, 3] in the image of a version of their frame, and where they are."""
    assert frame.camera is not None and frame.T_map_cam is not None
    pixels = frame.camera.project(transform_points(inverse(frame.T_map_cam), points))
    with np.errstate(invalid='ignore'):
        inside = np.all((pixels > 2) & (pixels < np.array(frame.camera.size_wh) - 3), axis=1)
    return np.flatnonzero(inside), pixels[inside]


def room_scene(index: int, encoder: CompactEncoder) -> MemoryScene:
    """A synthetic room for training, by number."""
    room = Room.generate(FIRST_TRAINING_ROOM + index)
    camera = Camera.from_fov(FOV_DEG, SIZE_WH)

    def views() -> Iterator[tuple[Frame, NDArray, NDArray]]:
        for frame in render_walk(room, camera, room.walk(VIEWS, index, ROOM_FPS), noise=NOISE,
                                 seed=index):
            assert frame.depth is not None
            pixels = encoder.encode(frame.image).keypoints
            column, row = np.rint(pixels).astype(int).clip(0, np.array(SIZE_WH) - 1).T
            yield frame, pixels, frame.depth[row, column]

    return described(views(), encoder, np.random.default_rng(index))


def photo_scene(folder: Path, encoder: CompactEncoder) -> MemoryScene:
    """A scene of posed photos with tracks (see ``training.posed``)."""
    scene = read_scene(folder)
    chosen = np.unique(np.linspace(0, len(scene.files) - 1, MOST_IMAGES).astype(int))

    def views() -> Iterator[tuple[Frame, NDArray, NDArray]]:
        for image in chosen:
            rows = scene.tracks(image)
            frame = Frame(int(image), scene.image(image), camera=scene.cameras[image],
                          T_map_cam=scene.T_world_cam[image])
            yield frame, scene.uv[rows], scene.depth[rows]

    return described(views(), encoder, np.random.default_rng(0))


def read_memory_scenes(rooms: int, photos: str, cache: Path) -> Iterator[MemoryScene]:
    """All scenes: ``rooms`` synthetic ones and those of a folder; kept in ``cache``."""
    encoder = CompactEncoder.load()
    cache.mkdir(parents=True, exist_ok=True)
    folders = sorted(f.parent for f in Path(photos).glob('*/tracks.npz')) if photos else []
    if photos and not folders:
        raise InputError(f'expected scenes with a tracks.npz in {photos}, found none; give '
                         'another folder')
    for index in range(rooms):
        yield _kept(cache / f'room{index:04d}.npz', partial(room_scene, index, encoder))
    for folder in folders:
        yield _kept(cache / f'{folder.name}.npz', partial(photo_scene, folder, encoder))


def _kept(file: Path, make: Callable[[], MemoryScene]) -> MemoryScene:
    if not file.exists():
        part = file.with_name(f'.{file.name}')
        np.savez(part, **vars(make()))
        part.replace(file)
    with np.load(file) as found:
        return MemoryScene(**found)
