"""Training scenes of the transformer: views of synthetic rooms, with exact truth.

Rooms are rendered once, to files of a few dozen views, square and large enough to be cut; every
training step draws windows from them. Nearly half of a room's views follow a walk, the others look
at one place each from around. In some rooms things move: they are elsewhere in every view.
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
from feedforward_recon.synthetic.moving import MovingThings
from feedforward_recon.synthetic.photos import photo_files
from feedforward_recon.synthetic.views import RenderedViews
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
MOST_THINGS = 3  # that move


@dataclass(frozen=True)
class RoomViews:
    """Views of one room; the principal point is the middle.

    image uint8 [V, H, W, 3] RGB; depth float16 [V, H, W] metres; K [V, 3, 3];
    T_world_cam [V, 4, 4];
    moving uint8 [V, H, W / 8]: bits of the pixels of what moves, see ``np.packbits``.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float16]
    K: NDArray[np.float64]
    T_world_cam: NDArray[np.float64]
    moving: NDArray[np.uint8]


def render_views(out: Path, count: int, kind: str, *, photos: str | Path | None = None,
                 device: str = 'cpu', moving_share: float = 0.0) -> Iterator[Path]:
    """Render ``count`` rooms of a kind (`FIRST_ROOM`) to out/<kind>NNNN.npz; yields each file.

    photos: folder of *.jpg for the faces of the rooms, see `Room.with_photos`. moving_share: of
    the rooms with things that move. Files that are there are kept, whatever they were rendered
    with. Raises InputError for a folder without photos, ConfigError for a device that does not
    work.
    """
    place = device_of(device)
    files = photo_files(photos) if photos else []
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f'{kind}{index:04d}.npz'
        if not file.exists():
            part, seed = file.with_name(f'.{file.name}'), FIRST_ROOM[kind] + index
            things = things_in(seed, moving_share)
            np.savez(part, **vars(views_of(seed, SIDE, files, place, things)))
            part.replace(file)
        yield file


def things_in(seed: int, moving_share: float) -> int:
    """How many things move in the room of a seed: none, or 1 to 3 in a share of the rooms."""
    rng = np.random.default_rng([seed, 1])
    return int(rng.integers(1, MOST_THINGS + 1)) if rng.random() < moving_share else 0


def views_of(seed: int, side: int = SIDE, photos: Sequence[Path] = (),
             device: str | torch.device = 'cpu', things: int = 0) -> RoomViews:
    """The views of one room, square of ``side`` pixels, with photos on its faces if there are any.

    device: what renders them; on a GPU they differ in single grey levels. things: how many move.
    """
    rng, their_rng = np.random.default_rng(seed), np.random.default_rng([seed, 2])
    stage = _stage(seed, photos, things, their_rng)
    walk = np.stack(stage.room.walk(WALK_VIEWS, seed, WALK_FPS))
    walk_camera = _camera(rng, side)
    walked = render_batch(stage.room, walk_camera, walk, device=device,
                          moving=stage.before(walk, their_rng))
    poses, cameras, anchors = [walk], [walk_camera] * len(walk), []
    for _ in range(PLACES):
        index = int(rng.integers(WALK_VIEWS))
        distance = float(np.median(walked.depth[index][~walked.moving[index]].cpu()))
        poses.append(_poses_around(stage.room, walk[index], distance, rng))
        anchors += [walk[index]] * VIEWS_PER_PLACE
        cameras += [_camera(rng, side)] * VIEWS_PER_PLACE
    around = render_batch(stage.room, cameras[len(walk):], np.concatenate(poses[1:]),
                          device=device, moving=stage.before(np.stack(anchors), their_rng))
    return _stored([walked, around], cameras, np.concatenate(poses))


def _stage(seed: int, photos: Sequence[Path], things: int, rng: np.random.Generator
           ) -> MovingThings:
    stage = MovingThings.drawn(Room.generate(seed), things, rng)
    room = _coarse(stage.room)
    return replace(stage, room=room.with_photos(photos, seed) if photos else room)


def _stored(parts: Sequence[RenderedViews], cameras: Sequence[Camera], T_world_cam: NDArray
            ) -> RoomViews:
    image, depth, moving = (torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
                            for name in ('image', 'depth', 'moving'))
    return RoomViews(np.ascontiguousarray(image.transpose(0, 2, 3, 1)), depth.astype(np.float16),
                     np.stack([c.K for c in cameras]), T_world_cam,
                     np.packbits(moving, axis=-1))


def _coarse(room: Room) -> Room:
    """The same room with textures that suffice for small images and are made much faster."""
    faces = [replace(face, texels_per_m=face.texels_per_m / COARSER) for face in room.faces]
    return replace(room, faces=faces, pyramids={})


def _camera(rng: np.random.Generator, side: int) -> Camera:
    focal = side / 2 / np.tan(np.deg2rad(rng.uniform(*FOV_DEG)) / 2)
    return Camera(side, side, focal, focal, (side - 1) / 2, (side - 1) / 2)


def _poses_around(room: Room, T_world_cam: NDArray, distance: float,
                  rng: np.random.Generator) -> NDArray[np.float64]:
    """Poses [VIEWS_PER_PLACE, 4, 4] in free space near a pose, looking roughly where it does."""
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
    return np.stack(found)
