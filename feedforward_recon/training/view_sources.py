"""Where training windows come from: posed photos with sparse tracks, rooms with exact depth.

Both say the same of a view: an image, its camera, and scene points that it shows at known depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.training.posed import PosedScene, read_scene, view_overlap
from feedforward_recon.training.room_views import HELD_OUT, TRAIN
from feedforward_recon.training.virtual_camera import VirtualCamera

MIN_SHARED_TRACKS = 15
ANGLE_DEG = (3.0, 50.0)  # between orientations of views that belong together
MIN_BASELINE = 0.05  # of the depth, where orientations are nearer than that
STAR_SHARE = 0.6  # of windows whose views all belong to the first one
SAME_DEPTH = 0.05  # share by which depths of one point differ
TRIES = 20
HELD_OUT_ROOMS = 2


@dataclass(frozen=True)
class SeenPoints:
    """Points that a view shows: pixels [M, 2], z-depth [M], and keys [M, ...].

    keys: what their source finds them in other views by.
    """

    pixels: np.ndarray
    depth: np.ndarray
    keys: np.ndarray


class ViewSource(Protocol):
    """Views of one scene."""

    @property
    def name(self) -> str:
        """That of its folder or file."""
        ...

    @property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of its images."""
        ...

    def window(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Numbers of so many views that overlap, the world's first; None if there are none."""
        ...

    def camera(self, view: int) -> Camera:
        """The real camera of a view."""
        ...

    def pose(self, view: int) -> np.ndarray:
        """T_world_cam [4, 4]."""
        ...

    def image(self, view: int) -> np.ndarray:
        """RGB uint8 [H, W, 3]."""
        ...

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """At most ``count`` points that a virtual camera at this view's place shows."""
        ...

    def found(self, view: int, through: VirtualCamera, keys: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [M, 2] of points with keys [M, ...] in a virtual camera; seen there: bool [M]."""
        ...


class PhotoSource:
    """Posed photos and their tracks."""

    def __init__(self, name: str, scene: PosedScene) -> None:
        self._name, self._scene = name, scene
        self._images: dict[int, np.ndarray] = {}

    @property
    def name(self) -> str:
        """See ``ViewSource``."""
        return self._name

    @property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of the first image."""
        return self._scene.cameras[0].size_wh

    @cached_property
    def _belong(self) -> np.ndarray:
        """Bool [N, N], which views share tracks and differ enough to show something new."""
        scene, count = self._scene, len(self._scene.files)
        (shared, angle), centre = view_overlap(scene), scene.T_world_cam[:, :3, 3]
        depth = np.array([np.median(scene.depth[scene.tracks(i)]) if
                          scene.tracks(i).stop > scene.tracks(i).start else np.inf
                          for i in range(count)])
        apart = np.linalg.norm(centre[:, None] - centre, axis=-1) / depth[:, None]
        found = (shared >= MIN_SHARED_TRACKS) & (angle <= ANGLE_DEG[1]) \
            & ((angle >= ANGLE_DEG[0]) | (apart > MIN_BASELINE))
        return found & ~np.eye(count, dtype=bool)

    def window(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """Views around the first one, or a chain of views that each belong to one before."""
        for _ in range(TRIES):
            chosen = [int(rng.integers(len(self._belong)))]
            star = rng.random() < STAR_SHARE
            while len(chosen) < count:
                to = chosen[:1] if star else [chosen[int(rng.integers(len(chosen)))]]
                free = self._free(to, chosen)
                if not len(free):
                    free = self._free(chosen, chosen)
                if not len(free):
                    break
                chosen.append(int(rng.choice(free)))
            if len(chosen) == count:
                return np.array(chosen)
        return None

    def _free(self, to: Sequence[int], chosen: Sequence[int]) -> np.ndarray:
        return np.setdiff1d(np.flatnonzero(self._belong[list(to)].any(0)), chosen)

    def camera(self, view: int) -> Camera:
        """See ``ViewSource``."""
        return self._scene.cameras[view]

    def pose(self, view: int) -> np.ndarray:
        """See ``ViewSource``."""
        return self._scene.T_world_cam[view]

    def image(self, view: int) -> np.ndarray:
        """See ``ViewSource``; decoded once."""
        if view not in self._images:
            self._images[view] = self._scene.image(view)
        return self._images[view]

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """Tracks of the view; their keys are the numbers of their points."""
        seen = self._tracked(view, through)
        kept = rng.permutation(len(seen.depth))[:count]
        return SeenPoints(seen.pixels[kept], seen.depth[kept], seen.keys[kept])

    def found(self, view: int, through: VirtualCamera, keys: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """Where the view has tracks of the same points."""
        seen = self._tracked(view, through)
        if not len(seen.keys):
            return np.zeros((len(keys), 2)), np.zeros(len(keys), bool)
        order = np.argsort(seen.keys)
        row = order[np.searchsorted(seen.keys[order], keys).clip(max=len(order) - 1)]
        return seen.pixels[row], seen.keys[row] == keys

    def _tracked(self, view: int, through: VirtualCamera) -> SeenPoints:
        tracks, camera = self._scene.tracks(view), self._scene.cameras[view]
        own = camera.unproject(self._scene.uv[tracks], self._scene.depth[tracks])
        pixels, depth, visible = through.seen(own)
        return SeenPoints(pixels[visible], depth[visible],
                          self._scene.point_id[tracks][visible])


@dataclass(frozen=True)
class RoomSource:
    """A file of ``ffrecon-train views``: what is drawn from it is read when it is used."""

    file: Path

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.file.stem

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.file) as arrays:
            return dict(arrays)

    @property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of its images."""
        height, width = self._arrays['depth'].shape[1:]
        return width, height

    def window(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """A piece of the walk, with gaps, or views of one place; in random order."""
        group = self._arrays['group']
        place = np.flatnonzero(group == 1 + rng.integers(group.max()))
        if count <= len(place) and rng.random() < 0.5:
            return rng.choice(place, count, replace=False)
        length = int((group == 0).sum())
        stride = int(rng.integers(1, 1 + max(1, length // 3 // max(1, count - 1))))
        # The walk is a loop: its end is next to its beginning.
        return rng.permutation((int(rng.integers(length)) + stride * np.arange(count)) % length)

    def camera(self, view: int) -> Camera:
        """See ``ViewSource``."""
        return Camera.from_matrix(self._arrays['K'][view], self.size_wh)

    def pose(self, view: int) -> np.ndarray:
        """See ``ViewSource``."""
        return self._arrays['T_world_cam'][view]

    def image(self, view: int) -> np.ndarray:
        """See ``ViewSource``."""
        return self._arrays['image'][view]

    def depth(self, view: int) -> np.ndarray:
        """Metres float16 [H, W]."""
        return self._arrays['depth'][view]

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """Random pixels of the view, with the exact depth; their keys are points in the world."""
        depth = self.depth(view)
        height, width = depth.shape
        px = np.column_stack([rng.integers(width, size=2 * count),
                              rng.integers(height, size=2 * count)])
        z = depth[px[:, 1], px[:, 0]].astype(float)
        own = self.camera(view).unproject(px.astype(float), z)
        pixels, z, visible = through.seen(own)
        kept = np.flatnonzero(visible)[:count]
        return SeenPoints(pixels[kept], z[kept], transform_points(self.pose(view), own[kept]))

    def found(self, view: int, through: VirtualCamera, keys: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """By projection, where the depth of the view agrees: nothing lies before the point."""
        depth, own = self.depth(view), transform_points(inverse(self.pose(view)), keys)
        pixels, _, visible = through.seen(own)
        safe = np.where(own[:, 2:] > 1e-6, own, (0.0, 0.0, 1.0))
        u, v = self.camera(view).project(safe).round().astype(int).T
        inside = visible & (u >= 0) & (v >= 0) & (u < depth.shape[1]) & (v < depth.shape[0])
        there = depth[np.where(inside, v, 0), np.where(inside, u, 0)]
        return pixels, inside & (np.abs(there - own[:, 2]) < SAME_DEPTH * own[:, 2])


def photo_sources(folder: Path, held_out: Sequence[str]
                  ) -> tuple[list[ViewSource], list[ViewSource]]:
    """All posed scenes of a folder: those to train on, and those held out.

    Raises InputError for a folder without scenes, and for names that are not there.
    """
    names = [file.parent.name for file in sorted(folder.glob('*/cameras.json'))]
    if set(names) <= set(held_out):
        raise InputError(f'expected scenes with a cameras.json in {folder} to train on, found '
                         'none; give another folder')
    if unknown := sorted(set(held_out) - set(names)):
        raise InputError(f'expected scenes of {folder} to hold out, found {unknown}; choose of '
                         f'{names}')
    sources: dict[str, ViewSource] = {name: PhotoSource(name, read_scene(folder / name))
                                      for name in names}
    return ([sources[name] for name in names if name not in held_out],
            [sources[name] for name in held_out])


def room_sources(folder: Path) -> tuple[list[RoomSource], list[ViewSource]]:
    """Rooms of ``ffrecon-train views``: those to train on, and two of those held out.

    Raises InputError where there are none.
    """
    rooms = [RoomSource(file) for file in sorted(folder.glob(f'{TRAIN}*.npz'))]
    if not rooms:
        raise InputError(f'expected {TRAIN}*.npz in {folder}, found none; run `ffrecon-train '
                         'views` first')
    held_out = sorted(folder.glob(f'{HELD_OUT}*.npz'))[:HELD_OUT_ROOMS]
    return rooms, [RoomSource(file) for file in held_out]
