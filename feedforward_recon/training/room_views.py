"""Training scenes of the transformer: views of synthetic rooms, with exact truth.

Rooms are rendered once, to files of a few dozen views, square and large enough to be cut; every
training step draws windows from them. Nearly half of a room's views follow a walk, the others look
at one place each from around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.configs import device_of
from feedforward_recon.synthetic import Room
from feedforward_recon.synthetic.batch import render_batch
from feedforward_recon.synthetic.photos import photo_files
from feedforward_recon.synthetic.walk import look

SIDE = 288
# Rooms 2000... are trained on, rooms 9000... never; tests and benchmarks use seeds below 1000.
TRAIN, HELD_OUT = 'train', 'held_out'
FIRST_ROOM = {TRAIN: 2000, HELD_OUT: 9000}
FOV_DEG = (45.0, 85.0)
WALK_VIEWS, WALK_FPS = 24, 2.0
PLACES, VIEWS_PER_PLACE = 4, 8
CLEARANCE_M, SMALLEST_SPREAD_M = 0.15, 0.05
COARSER = 2


@dataclass(frozen=True)
class RoomViews:
    """Views of one room; the principal point is the middle.

    image uint8 [V, H, W, 3] RGB; depth float16 [V, H, W] metres; K [V, 3, 3];
    T_world_cam [V, 4, 4]; group [V]: 0 for the walk, in its order, then one number per place.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float16]
    K: NDArray[np.float64]
    T_world_cam: NDArray[np.float64]
    group: NDArray[np.int8]


def render_views(out: Path, count: int, kind: str, *, photos: str | Path | None = None,
                 device: str = 'cpu') -> Iterator[Path]:
    """Render ``count`` rooms of a kind (`FIRST_ROOM`) to out/<kind>NNNN.npz; yields each file.

    photos: folder of *.jpg for the faces of the rooms, see `Room.with_photos`. Files that are
    there are kept, whatever they were rendered with. Raises InputError for a folder without
    photos, ConfigError for a device that does not work.
    """
    place = device_of(device)
    files = photo_files(photos) if photos else []
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f'{kind}{index:04d}.npz'
        if not file.exists():
            part = file.with_name(f'.{file.name}')
            np.savez(part, **vars(views_of(FIRST_ROOM[kind] + index, SIDE, files, place)))
            part.replace(file)
        yield file


def views_of(seed: int, side: int = SIDE, photos: Sequence[Path] = (),
             device: str | torch.device = 'cpu') -> RoomViews:
    """The views of one room, square of ``side`` pixels, with photos on its faces if there are any.

    device: what renders them; on a GPU they differ in single grey levels.
    """
    rng = np.random.default_rng(seed)
    room = _coarse(Room.generate(seed))
    if photos:
        room = room.with_photos(photos, seed)
    walk = list(room.walk(WALK_VIEWS, seed, WALK_FPS))
    cameras = [_camera(rng, side)] * len(walk)
    rendered = render_batch(room, cameras, walk, device=device)
    around: list[NDArray[np.float64]] = []
    for _ in range(PLACES):
        index = int(rng.integers(WALK_VIEWS))
        distance = float(np.median(rendered.depth[index].cpu()))
        around += _poses_around(room, walk[index], distance, rng)
        cameras += [_camera(rng, side)] * VIEWS_PER_PLACE
    more = render_batch(room, cameras[WALK_VIEWS:], around, device=device)
    image, depth = (torch.cat([getattr(part, name) for part in (rendered, more)]).cpu().numpy()
                    for name in ('image', 'depth'))
    groups = [0] * WALK_VIEWS + [1 + k // VIEWS_PER_PLACE for k in range(len(around))]
    return RoomViews(np.ascontiguousarray(image.transpose(0, 2, 3, 1)), depth.astype(np.float16),
                     np.stack([c.K for c in cameras]), np.stack(walk + around),
                     np.array(groups, np.int8))


def _coarse(room: Room) -> Room:
    """The same room with textures that suffice for small images and are made much faster."""
    faces = [replace(face, texels_per_m=face.texels_per_m / COARSER) for face in room.faces]
    return replace(room, faces=faces, pyramids={})


def _camera(rng: np.random.Generator, side: int) -> Camera:
    focal = side / 2 / np.tan(np.deg2rad(rng.uniform(*FOV_DEG)) / 2)
    return Camera(side, side, focal, focal, (side - 1) / 2, (side - 1) / 2)


def _poses_around(room: Room, T_world_cam: NDArray, distance: float,
                  rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Poses in free space near a pose that look roughly at what it looks at."""
    target = T_world_cam[:3, 3] + distance * T_world_cam[:3, 2]
    spread = distance * rng.uniform(0.1, 0.6)
    found: list[NDArray[np.float64]] = []
    while len(found) < VIEWS_PER_PLACE:
        position = T_world_cam[:3, 3] + spread * rng.uniform(-1, 1, 3) * (1, 1, 0.6)
        if room.clearance(position[None])[0] < CLEARANCE_M and spread > SMALLEST_SPREAD_M:
            spread *= 0.9  # towards the pose itself, which is free
            continue
        x, y, z = target - position
        yaw, pitch, roll = np.array([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y)), 0]) \
            + np.deg2rad(rng.normal(0, (5, 5, 6)))
        pose = np.eye(4)
        pose[:3, :3] = look(*np.array([[yaw], [pitch], [roll]]))[0]
        pose[:3, 3] = position
        found.append(pose)
    return found
