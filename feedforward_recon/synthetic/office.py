"""An office of like cubicles in a row: the same furniture and textures again and again.

Most views into a cubicle fit every other one as well; its ends, and personal things in some
cubicles, tell where one is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.transforms import make_transform
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.lighting import Lamp
from feedforward_recon.synthetic.room import Face, Room, faces_of
from feedforward_recon.synthetic.walk import SPEED_M_S, look

DEPTH_M, HEIGHT_M = 4.6, 2.7
END_M = 1.2  # free floor beyond the first and the last cubicle
AISLE_Y_M = (-0.9, -0.2)  # where the camera walks: the cubicles are on the far side, y > 0.4
SHELL_TEXELS_PER_M = 120.0  # plain walls, without marks of use that would tell where one is
DESK_M, DESK_TOP_M = 0.5, 0.74  # from the wall to the middle of a desk; its height
SHELL_FACES = 6  # faces_of begins with them
PERSONAL = 0.3  # share of the cubicles in which somebody has things of his own


def office(seed: int, cubicles: int = 8, pitch_m: float = 1.8, *, same_things: bool = True
           ) -> Room:
    """The office of a seed: a room with x along the row of ``cubicles``.

    same_things: what stands and hangs around the desks is alike too; else only desks, chairs,
    drawers, carpets and windows are.
    """
    rng = np.random.default_rng((seed, 7))
    size = np.array([cubicles * pitch_m + 2 * END_M, DEPTH_M, HEIGHT_M])
    furniture, things = _furniture(rng, pitch_m), _things(rng, pitch_m)
    paint, own_paint = (int(rng.integers(2**31)) for _ in range(2))
    places = [(i - (cubicles - 1) / 2) * pitch_m for i in range(cubicles)]
    boxes, faces = _ends(rng, size), _shell(rng, size)
    faces += _faces(rng, size, boxes)
    for number, x in enumerate(places):
        painter = np.random.default_rng(paint)
        parts = [(furniture, painter), (things, painter)]
        if not same_things:
            own = np.random.default_rng((own_paint, number))
            parts[1] = (_things(own, pitch_m), own)
        if rng.random() < PERSONAL:
            parts.append((_personal(rng), rng))
        for part, painter in parts:
            placed = [replace(box, centre=box.centre + (x, 0, 0)) for box in part]
            boxes += placed
            faces += _faces(painter, size, placed)
    lamps = [Lamp(np.array([x, -0.4, HEIGHT_M - 0.1]), 0.3, np.full(3, 0.9))
             for x in places]
    return Room(seed, size, boxes, faces, lamps)


def aisle_walk(room: Room, n_frames: int, seed: int, fps: float = 4.0
               ) -> list[NDArray[np.float64]]:
    """Poses T_world_cam of a walk down the aisle from the left, at about 0.4 m/s.

    The camera looks at the cubicles and sweeps to both sides.
    """
    rng = np.random.default_rng((room.seed, seed, 5))
    time_s = np.arange(n_frames) / fps
    phase = rng.uniform(0, 2 * np.pi, 5)
    end = room.size[0] / 2 - 0.7
    x = -end + np.clip(SPEED_M_S * time_s, 0, 2 * end)
    y = np.mean(AISLE_Y_M) + np.ptp(AISLE_Y_M) / 2 * np.sin(0.5 * time_s + phase[0])
    z = 1.4 + 0.15 * np.sin(0.7 * time_s + phase[1])
    yaw = np.deg2rad(90 + 50 * np.sin(0.6 * time_s + phase[2]))
    pitch = np.deg2rad(-8 + 8 * np.sin(0.8 * time_s + phase[3]))
    roll = np.deg2rad(2 * np.sin(1.1 * time_s + phase[4]))
    return list(make_transform(look(yaw, pitch, roll), np.column_stack([x, y, z])))


def _shell(rng: np.random.Generator, size: NDArray) -> list[Face]:
    return [replace(face, style='paint', texels_per_m=SHELL_TEXELS_PER_M)
            for face in faces_of(rng, size, [])]


def _faces(rng: np.random.Generator, size: NDArray, boxes: list[Box]) -> list[Face]:
    """Those of the boxes alone; the shell's come first and are drawn from a copy of the room."""
    return faces_of(rng, size, boxes)[SHELL_FACES:]


def _box(kind: str, centre: tuple[float, float, float], half: tuple[float, float, float],
         yaw: float = 0.0) -> Box:
    return Box(kind, np.array(centre), np.array(half), yaw)


def _furniture(rng: np.random.Generator, pitch_m: float) -> list[Box]:
    """Desk, drawers, chair and carpet of a cubicle around x = 0, and what is opposite it."""
    half, wall = pitch_m / 2, DEPTH_M / 2
    desk_y, top, chair = wall - DESK_M, DESK_TOP_M, rng.uniform(-0.2, 0.2)
    return [_box('table', (0.0, desk_y, top), (half - 0.15, 0.38, 0.02)),
            _box('cabinet', (half - 0.45, desk_y, top / 2 - 0.02), (0.22, 0.3, top / 2 - 0.03)),
            _box('rug', (0.0, 0.0, 0.004), (half, 1.0, 0.004)),
            _box('sofa', (chair, desk_y - 0.6, 0.46), (0.22, 0.22, 0.04)),
            _box('sofa', (chair, desk_y - 0.8, 0.78), (0.2, 0.03, 0.24)),
            _box('leg', (chair, desk_y - 0.6, 0.21), (0.03, 0.03, 0.2)),
            _box('window', (0.0, -wall + 0.02, 1.6), (0.6, 0.015, 0.5)),
            _box('cabinet', (0.0, -wall + 0.2, 0.4), (half - 0.1, 0.18, 0.4), np.pi)]


def _things(rng: np.random.Generator, pitch_m: float) -> list[Box]:
    """Partitions of a cubicle around x = 0, its shelf, screen, picture and small things."""
    half, wall = pitch_m / 2, DEPTH_M / 2
    desk_y, top = wall - DESK_M, DESK_TOP_M
    screen, turn = rng.uniform(-0.25, 0.25), rng.normal(0, 0.1)
    boxes = [_box('sofa', (-half + 0.03, wall - 0.75, 0.7), (0.025, 0.7, 0.7)),
             _box('sofa', (0.0, wall - 0.03, 0.75), (half - 0.02, 0.02, 0.75)),
             _box('shelf', (0.0, wall - 0.18, 1.45), (half - 0.3, 0.13, 0.015)),
             _box('picture', (screen, desk_y + 0.12, top + 0.36), (0.3, 0.015, 0.18), turn),
             _box('leg', (screen, desk_y + 0.17, top + 0.11), (0.03, 0.02, 0.09)),
             _box('picture', (rng.uniform(-0.4, 0.4), wall - 0.01, 2.0), (0.35, 0.01, 0.25)),
             _box('books', (-0.25, wall - 0.18, 1.57), (0.2, 0.09, 0.105)),
             _box('object', (0.3, wall - 0.18, 1.53), (0.08, 0.06, 0.065))]
    for x in (-half + 0.35, screen - 0.05, half - 0.35):
        size = rng.uniform((0.04, 0.04, 0.03), (0.1, 0.09, 0.12))
        boxes.append(Box('object', np.array([x, desk_y - 0.2, top + 0.02 + size[2]]), size,
                         rng.normal(0, 0.6)))
    return boxes


def _personal(rng: np.random.Generator) -> list[Box]:
    """A picture of one's own on the wall and a thing on the shelf."""
    wall, side = DEPTH_M / 2, rng.choice([-1, 1])
    return [_box('picture', (side * 0.6, wall - 0.06, 1.15), (0.18, 0.008, 0.14)),
            _box('object', (0.05, wall - 0.18, 1.56), (0.07, 0.07, 0.09))]


def _ends(rng: np.random.Generator, size: NDArray) -> list[Box]:
    """Pictures and a cabinet at the left end, pictures and a door at the right one."""
    boxes = []
    for side, kind in ((-1, 'cabinet'), (1, 'door')):
        x, yaw = side * (size[0] / 2 - 0.02), -side * np.pi / 2
        for y in (-1.4, 0.0, 1.4):
            half = rng.uniform((0.25, 0.012, 0.2), (0.5, 0.013, 0.4))
            boxes.append(Box('picture', np.array([x, y, rng.uniform(1.5, 1.9)]), half, yaw))
        depth = 0.02 if kind == 'door' else 0.2
        height = 1.0 if kind == 'door' else 0.45
        boxes.append(Box(kind, np.array([side * (size[0] / 2 - depth - 0.01), 0.9, height]),
                         np.array([0.45, depth, height]), yaw))
    return boxes
