"""What stands in a room: boxes with a place, a turn about the vertical and textures by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Choice = tuple[str, ...]

# Textures a face of each kind of box may carry: (front, top, other sides).
STYLES: dict[str, tuple[Choice, Choice, Choice]] = {
    'cabinet': (('panels', 'panels', 'books', 'books'), ('wood', 'marble'),
                ('wood', 'wood', 'paint', 'plaster')),
    'table': (('wood', 'paint'), ('wood', 'marble', 'plaid', 'wood'), ('wood', 'paint')),
    'leg': (('wood', 'paint'),) * 3,
    'crate': (('poster', 'wood', 'dead_leaves', 'tiles'), ('wood', 'poster', 'dead_leaves'),
              ('wood', 'stripes', 'poster', 'blobs')),
    'sofa': (('plaid', 'rug', 'stripes', 'plaster', 'blobs'),) * 3,
    'picture': (('landscape', 'landscape', 'landscape', 'dead_leaves', 'dead_leaves', 'poster',
                 'poster', 'poster', 'blobs', 'rug', 'plaid'),
                ('wood', 'paint'), ('wood', 'paint')),
    'window': (('window',), ('paint',), ('paint',)),
    'door': (('panels', 'wood'), ('wood',), ('wood', 'paint')),
    'rug': (('paint',), ('rug', 'rug', 'plaid', 'blobs', 'stripes'), ('paint',)),
    'shelf': (('wood', 'paint'),) * 3,
    'books': (('books',), ('stripes', 'plaster'), ('poster', 'blobs')),
    'object': (('poster', 'landscape', 'dead_leaves', 'blobs', 'tiles', 'stripes', 'plaid'),
               ('dead_leaves', 'poster', 'marble'), ('poster', 'stripes', 'plaster', 'wood')),
}
WALLS: Choice = ('paint', 'plaster', 'plaster', 'plaster', 'tiles', 'tiles', 'wood', 'marble',
                 'stripes', 'rug')
FLOORS: Choice = ('wood', 'wood', 'wood', 'tiles', 'tiles', 'tiles', 'marble', 'plaster', 'rug')
CEILINGS: Choice = ('paint', 'plaster', 'plaster', 'tiles', 'wood')


@dataclass(frozen=True)
class Box:
    """A cuboid: centre [3], half sizes [3] along its own axes, yaw about z (metres, radians).

    Its front looks along its own -y.
    """

    kind: str
    centre: NDArray[np.float64]
    half: NDArray[np.float64]
    yaw: float = 0.0

    @property
    def R_world_box(self) -> NDArray[np.float64]:
        """Rotation [3, 3] from the box's axes to the world's."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    @property
    def reach(self) -> float:
        """Radius of the circle around the centre that contains the box, seen from above."""
        return float(np.hypot(*self.half[:2]))

    @property
    def top(self) -> float:
        """Height of the upper face."""
        return float(self.centre[2] + self.half[2])

    def placed(self, x: float, y: float, z: float) -> NDArray[np.float64]:
        """World position of the point (x, y) of the box's own axes, at height z."""
        place = self.centre + self.R_world_box @ (x, y, 0.0)
        return np.array([place[0], place[1], z])


def furnish(rng: np.random.Generator, size: NDArray[np.float64]) -> list[Box]:
    """Furniture and decoration for an empty room of ``size`` [3]."""
    floor: list[Box] = []
    for _ in range(60):
        if len(floor) < 5 or (len(floor) < 8 and rng.random() < 0.08):
            piece = _against_wall(rng, size) if rng.random() < 0.75 else _free_standing(rng, size)
            if not any(_overlap(piece, other) for other in floor):
                floor.append(piece)
    boxes: list[Box] = []
    for piece in floor:
        boxes += _built(rng, piece)
        boxes += _on_top(rng, piece)
    boxes += _hung(rng, size, floor)
    if rng.random() < 0.6:
        half = np.array([*rng.uniform(0.4, 1.1, 2), 0.006])
        boxes.append(Box('rug', np.array([*rng.uniform(-0.6, 0.6, 2), 0.006]), half,
                         float(rng.uniform(0, np.pi))))
    return boxes


def _wall_frame(wall: int, size: NDArray) -> tuple[float, float, float]:
    """Yaw of things on a wall (front into the room), half length of it, distance to it."""
    along, away = (size[0], size[1]) if wall % 2 == 0 else (size[1], size[0])
    return wall * np.pi / 2, along / 2, away / 2


def _at_wall(wall: int, size: NDArray, along: float, gap: float, z: float) -> NDArray:
    """World point ``gap`` metres in front of a wall and ``along`` metres from its middle."""
    yaw, _, away = _wall_frame(wall, size)
    c, s = np.cos(yaw), np.sin(yaw)
    y = away - gap
    return np.array([c * along - s * y, s * along + c * y, z])


def _against_wall(rng: np.random.Generator, size: NDArray) -> Box:
    kind = str(rng.choice(['cabinet', 'cabinet', 'table', 'sofa']))
    low, high = {'cabinet': (0.7, min(2.2, size[2] - 0.3)), 'table': (0.7, 0.8),
                 'sofa': (0.4, 0.5)}[kind]
    half = np.array([rng.uniform(0.3, 0.9), rng.uniform(0.18, 0.38), rng.uniform(low, high) / 2])
    wall = int(rng.integers(4))
    yaw, length, _ = _wall_frame(wall, size)
    along = rng.uniform(-1, 1) * (length - half[0] - 0.02)
    turn = rng.normal(0, 0.03)
    gap = half[1] + 0.01 + abs(np.sin(turn)) * half[0]
    return Box(kind, _at_wall(wall, size, along, gap, half[2]), half, yaw + turn)


def _free_standing(rng: np.random.Generator, size: NDArray) -> Box:
    kind = str(rng.choice(['table', 'crate', 'sofa']))
    half = np.array([rng.uniform(0.25, 0.6), rng.uniform(0.2, 0.4), rng.uniform(0.35, 0.8) / 2])
    room = size[:2] / 2 - np.hypot(*half[:2]) - 0.05
    centre = np.array([*(rng.uniform(-1, 1, 2) * room), half[2]])
    return Box(kind, centre, half, float(rng.uniform(0, 2 * np.pi)))


def _overlap(a: Box, b: Box) -> bool:
    """Do the footprints come closer than a hand's breadth? Separating axes of both boxes."""
    offset = b.centre - a.centre
    for axis in np.concatenate([a.R_world_box[:, :2], b.R_world_box[:, :2]], 1).T:
        reach = sum(np.abs(axis @ box.R_world_box) @ box.half for box in (a, b))
        if abs(axis @ offset) > reach + 0.08:
            return False
    return True


def _built(rng: np.random.Generator, piece: Box) -> Iterator[Box]:
    """The boxes a piece of furniture is made of: tables get legs, sofas a back."""
    hx, hy, hz = piece.half
    if piece.kind == 'table':
        plate = rng.uniform(0.015, 0.04)
        board = np.array([hx, hy, plate])
        yield Box('table', piece.placed(0, 0, 2 * hz - plate), board, piece.yaw)
        foot = rng.uniform(0.02, 0.04)
        for sx in (-1, 1):
            for sy in (-1, 1):
                place = piece.placed(sx * (hx - foot), sy * (hy - foot), hz - plate)
                yield Box('leg', place, np.array([foot, foot, hz - plate]), piece.yaw)
        return
    yield piece
    if piece.kind == 'sofa':
        back = rng.uniform(0.15, 0.25)
        yield Box('sofa', piece.placed(0, hy - 0.06, 2 * hz + back), np.array([hx, 0.06, back]),
                  piece.yaw)


def _on_top(rng: np.random.Generator, piece: Box) -> Iterator[Box]:
    """A few small things on a piece of furniture, none inside another."""
    if piece.top > 1.6 or piece.kind == 'sofa':
        return
    placed: list[Box] = []
    for _ in range(rng.integers(2, 7)):
        half = rng.uniform((0.04, 0.03, 0.04), (0.16, 0.13, 0.2))
        room = piece.half[:2] - np.hypot(*half[:2])
        if (room <= 0).any():
            continue
        x, y = rng.uniform(-1, 1, 2) * room
        item = Box(str(rng.choice(['object', 'object', 'books'])),
                   piece.placed(x, y, piece.top + half[2]), half,
                   piece.yaw + rng.normal(0, 0.5))
        if not any(_overlap(item, other) for other in placed):
            placed.append(item)
    yield from placed


def _hung(rng: np.random.Generator, size: NDArray, floor: list[Box]) -> Iterator[Box]:
    """Doors, windows, shelves and pictures, above the furniture and beside each other."""
    for wall in range(4):
        yaw, length, _ = _wall_frame(wall, size)
        placed: list[Box] = []
        kinds = ['door'] * (rng.random() < 0.4) + ['window'] * (rng.random() < 0.4) \
            + ['shelf'] * int(rng.integers(3)) + ['picture'] * int(rng.integers(4, 9))
        for kind in kinds:
            half, z = _hanging(rng, kind, size)
            along = rng.uniform(-1, 1) * (length - half[0] - 0.05)
            piece = Box(kind, _at_wall(wall, size, along, half[1] + 0.002, z), half, yaw)
            behind = any(_overlap(piece, other) and other.top + 0.1 > z - half[2]
                         for other in floor)
            if behind or any(_overlap(piece, other) and abs(piece.centre[2] - other.centre[2])
                             < half[2] + other.half[2] + 0.08 for other in placed):
                continue
            placed.append(piece)
            yield piece
            if kind == 'shelf':
                row = np.array([half[0] * 0.45, 0.09, 0.115])
                stock = Box('books', piece.placed(-half[0] * 0.5, 0, piece.top + row[2]), row, yaw)
                placed.append(stock)
                yield stock
                thing = rng.uniform((0.04, 0.03, 0.05), (0.12, 0.08, 0.15))
                yield Box('object', piece.placed(half[0] * 0.5, 0, piece.top + thing[2]), thing,
                          yaw + rng.normal(0, 0.2))


def _hanging(rng: np.random.Generator, kind: str, size: NDArray) -> tuple[NDArray, float]:
    """Half sizes [3] and height of the centre of a thing on a wall."""
    if kind == 'shelf':
        return np.array([rng.uniform(0.3, 0.6), 0.12, 0.015]), float(rng.uniform(1.2, 1.9))
    if kind == 'door':
        half = np.array([rng.uniform(0.38, 0.5), 0.02, rng.uniform(0.98, 1.06)])
        return half, float(half[2])
    if kind == 'window':
        half = np.array([rng.uniform(0.4, 0.9), 0.015, rng.uniform(0.4, 0.6)])
        return half, float(rng.uniform(1.4, size[2] - half[2] - 0.15))
    half = np.array([rng.uniform(0.12, 0.5), rng.uniform(0.008, 0.03), rng.uniform(0.12, 0.45)])
    return half, float(rng.uniform(half[2] + 0.75, size[2] - half[2] - 0.1))
