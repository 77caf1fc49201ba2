"""Something to train on that needs no download: rendered rooms, also as posed photos with tracks.

    python -m benchmarks.rendered_photos OUT --scenes 2
    ffrecon-train transformer --photos OUT/photos --rooms OUT/rooms --out run

For rehearsals and tests alone: small images of two rooms teach nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from feedforward_recon.training.depth_source import DepthSource
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.room_views import TRAIN, views_of
from feedforward_recon.training.virtual_camera import whole_view

FIRST_SEED = 9500  # of rooms that nothing is trained on
SIDE, VIEWS, POINTS = 128, 12, 60  # pixels of an image, images of a scene, points of an image
HALF = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # pixel centres lie at halves in the files


def write_scene(room: DepthSource, folder: Path) -> None:
    """The first views of a room as photos, with tracks where points are seen."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    entries = []
    for view in range(VIEWS):
        file = f'images/{view}.png'
        cv2.imwrite(str(folder / file), room.image(view)[..., ::-1])
        entries.append({'file': file, 'K': (room.camera(view).K + HALF).tolist(),
                        'distortion': [0.0] * 4, 'T_world_camera': room.pose(view).tolist()})
    (folder / 'cameras.json').write_text(json.dumps({'frames': entries}), encoding='utf-8')
    rng = np.random.default_rng(0)
    table = np.array([row for view in range(VIEWS) for row in _tracks(room, view, rng)])
    np.savez(folder / 'tracks.npz', image_index=table[:, 0].astype(np.int32),
             uv=table[:, 1:3].astype(np.float32), depth=table[:, 3].astype(np.float32),
             point_id=table[:, 4].astype(np.int32))


def _tracks(room: DepthSource, view: int, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Image, pixel, depth and number of what a view shows, in each view that sees it."""
    rows: list[tuple[float, ...]] = []
    width, height = room.size_wh
    uv = rng.integers(2, (width - 2, height - 2), (POINTS, 2))
    z = room.depth(view)[uv[:, 1], uv[:, 0]].astype(float)
    T = room.pose(view)
    world = room.camera(view).unproject(uv.astype(float), z) @ T[:3, :3].T + T[:3, 3]
    for other in range(VIEWS):
        T = room.pose(other)
        depth = ((world - T[:3, 3]) @ T[:3, :3])[:, 2]
        pixels, visible = room.found(other, whole_view(room.camera(other), room.size_wh), world)
        rows += [(other, *(pixels[k] + 0.5), depth[k], POINTS * view + k)
                 for k in np.flatnonzero(visible)]
    return rows


def write_scenes(out: Path, scenes: int) -> None:
    """So many rooms in out/rooms and, as photos, in out/photos; those that are there are kept."""
    (out / 'rooms').mkdir(parents=True, exist_ok=True)
    for number in range(scenes):
        folder, file = out / f'photos/room{number:04d}', out / f'rooms/{TRAIN}{number:04d}.npz'
        if not (folder / 'tracks.npz').exists():
            np.savez(file, **vars(views_of(FIRST_SEED + number, SIDE)))
            write_scene(room_source(file), folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the scenes."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, metavar='OUT')
    parser.add_argument('--scenes', type=int, default=2)
    options = parser.parse_args(arguments)
    write_scenes(options.out, options.scenes)
    return 0


if __name__ == '__main__':
    sys.exit(main())
