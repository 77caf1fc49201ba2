"""Views of synthetic rooms on disk, as the training of the encoder reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.synthetic import Room

# Rooms 1000, 1001, ... are for training; tests, demo and benchmarks use smaller seeds.
FIRST_TRAINING_ROOM = 1000
SIZE_WH = (480, 360)
WALK_FRAMES, VIEWS = 240, 10
FOV_DEG = (50.0, 75.0)


def render_rooms(out: Path, count: int) -> Iterator[Path]:
    """Render ``count`` rooms to out/rNNNN.npz, skipping those already there; yields each file.

    A file holds VIEWS views in the order of a walk: image uint8 [V, H, W, 3], depth float16
    [V, H, W] in metres, K [3, 3] and T_world_cam [V, 4, 4].
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f'r{index:04d}.npz'
        if not file.exists():
            part = file.with_name(f'.{file.name}')
            np.savez(part, **_views(index))  # type: ignore[arg-type]
            part.replace(file)
        yield file


def _views(index: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    room = Room.generate(FIRST_TRAINING_ROOM + index)
    camera = Camera.from_fov(rng.uniform(*FOV_DEG), SIZE_WH)
    walk = room.walk(WALK_FRAMES, index)
    poses = [walk[i] for i in np.sort(rng.choice(WALK_FRAMES, VIEWS, replace=False))]
    images, depths = zip(*(room.render(camera, pose) for pose in poses), strict=True)
    return {'image': np.stack(images), 'depth': np.stack(depths).astype(np.float16),
            'K': camera.K, 'T_world_cam': np.stack(poses)}
