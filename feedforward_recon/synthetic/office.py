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
PERSONAL = 0.3  # share of the cubicles in which somebody has things of his own


def office(seed: int, cubicles: int = 8, pitch_m: float = 1.8) -> Room:
    """The office of a seed: a room with x along the row of ``cubicles``."""
    rng = np.random.default_rng((seed, 7))
    size = np.array([cubicles * pitch_m + 2 * END_M, DEPTH_M, HEIGHT_M])
    copies = int(rng.integers(2**31))
    unit = _cubicle(rng, pitch_m)
    places = [(i - (cubicles - 1) / 2) * pitch_m for i in range(cubicles)]
    boxes, faces = _ends(rng, size), _shell(rng, size)
    faces += faces_of(rng, size, boxes)[len(faces):]
    for x in places:
        own = _personal(rng, x) if rng.random() < PERSONAL else []
        alike = [replace(box, centre=box.centre + (x, 0, 0)) for box in unit]
        faces += faces_of(np.random.default_rng(copies), size, alike)[6:]
        faces += faces_of(rng, size, own)[6:]
        boxes += alike + own
    lamps = [Lamp(np.array([x, -0.4, HEIGHT_M - 0.1]), 0.3, np.full(3, 1.8))
             for x in places[::2]]
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


def _cubicle(rng: np.random.Generator, pitch_m: float) -> list[Box]:
    """Furniture of one cubicle, and the piece of the far side opposite it, around x = 0."""
    half, wall = pitch_m / 2, DEPTH_M / 2
    desk_y, top = wall - 0.5, rng.uniform(0.7, 0.78)

    def box(kind: str, centre: tuple[float, float, float], size: tuple[float, float, float],
            yaw: float = 0.0) -> Box:
        return Box(kind, np.array(centre), np.array(size), yaw)

    boxes = [box('sofa', (-half + 0.03, wall - 0.75, 0.7), (0.025, 0.7, 0.7)),
             box('sofa', (0.0, wall - 0.03, 0.75), (half - 0.02, 0.02, 0.75)),
             box('table', (0.0, desk_y, top), (half - 0.15, 0.38, 0.02)),
             box('cabinet', (half - 0.45, desk_y, top / 2 - 0.02), (0.22, 0.3, top / 2 - 0.03)),
             box('shelf', (0.0, wall - 0.18, 1.45), (half - 0.3, 0.13, 0.015)),
             box('rug', (0.0, 0.0, 0.004), (half, 1.0, 0.004))]
    screen_x, turn = rng.uniform(-0.25, 0.25), rng.normal(0, 0.1)
    boxes += [box('picture', (screen_x, desk_y + 0.12, top + 0.36), (0.3, 0.015, 0.18), turn),
              box('leg', (screen_x, desk_y + 0.17, top + 0.11), (0.03, 0.02, 0.09)),
              box('picture', (rng.uniform(-0.4, 0.4), wall - 0.01, 2.0), (0.35, 0.01, 0.25)),
              box('books', (-0.25, wall - 0.18, 1.57), (0.2, 0.09, 0.105)),
              box('object', (0.3, wall - 0.18, 1.53), (0.08, 0.06, 0.065))]
    for x in (-half + 0.35, screen_x - 0.05, half - 0.35):
        size = rng.uniform((0.04, 0.04, 0.03), (0.1, 0.09, 0.12))
        boxes.append(box('object', (x, desk_y - 0.2, top + 0.02 + size[2]), tuple(size),
                         rng.normal(0, 0.6)))
    chair = rng.uniform(-0.2, 0.2)
    boxes += [box('sofa', (chair, desk_y - 0.6, 0.46), (0.22, 0.22, 0.04)),
              box('sofa', (chair, desk_y - 0.8, 0.78), (0.2, 0.03, 0.24)),
              box('leg', (chair, desk_y - 0.6, 0.21), (0.03, 0.03, 0.2)),
              box('window', (0.0, -wall + 0.02, 1.6), (0.6, 0.015, 0.5)),
              box('cabinet', (0.0, -wall + 0.2, 0.4), (half - 0.1, 0.18, 0.4), np.pi)]
    return boxes


def _personal(rng: np.random.Generator, x: float) -> list[Box]:
    """A picture of one's own on the wall and a thing on the shelf."""
    wall = DEPTH_M / 2
    side = rng.choice([-1, 1])
    return [Box('picture', np.array([x + side * 0.6, wall - 0.06, 1.15]),
                np.array([0.18, 0.008, 0.14])),
            Box('object', np.array([x + 0.05, wall - 0.18, 1.56]), np.array([0.07, 0.07, 0.09]))]


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
