"""A long hall with two furnished ends; what lies between them is white, or papered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feedforward_recon.synthetic import lighting
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.render import Surface
from feedforward_recon.synthetic.room import WALL_TEXELS_PER_M, Face, Room, box_faces

SIZE_M = np.array([9.0, 2.6, 2.6])
MIDDLE_M = 4.0  # length of what lies between the ends
# A white wall has neither pictures nor stains: few texels, which get no details.
WHITE_TEXELS_PER_M = 20.0
PAPERS = ('tiles', 'wood', 'marble', 'rug', 'dead_leaves')


def hall(seed: int, middle: str) -> Room:
    """The hall of a seed along x; middle: 'white' or 'papered'."""
    rng = np.random.default_rng(seed)
    boxes = [*_furniture(rng, -1), *_furniture(rng, 1)]
    faces = []
    for surface in _shell():
        edges = _cuts(surface)
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            part = Surface(surface.corner + first * surface.side_u,
                           (last - first) * surface.side_u, surface.side_v)
            centre = part.corner + 0.5 * (part.side_u + part.side_v)
            white = middle == 'white' and abs(centre[0]) < MIDDLE_M / 2
            faces.append(Face(part, 'paint' if white else str(rng.choice(PAPERS)),
                              int(rng.integers(2**62)),
                              WHITE_TEXELS_PER_M if white else WALL_TEXELS_PER_M))
    lamps = [replace(lamp, centre=np.array([x, 0.0, SIZE_M[2] - 0.1]))
             for x in (-3.0, 0.0, 3.0) for lamp in lighting.lamps(rng, SIZE_M)[:1]]
    return Room(seed, SIZE_M, boxes, [*faces, *box_faces(rng, boxes)], lamps)


def _shell() -> list[Surface]:
    """Walls, floor and ceiling as seen from inside, with side_u along x where they are long."""
    x, y, z = (np.diag(SIZE_M)[i] for i in range(3))
    low = np.array([-SIZE_M[0] / 2, -SIZE_M[1] / 2, 0.0])
    return [Surface(low + y + z, x, -z), Surface(low + x + z, -x, -z),  # at +y and at -y
            Surface(low + y, x, -y), Surface(low + z, x, y),  # floor and ceiling
            Surface(low + z, y, -z), Surface(low + x + y + z, -y, -z)]  # at -x and at +x


def _cuts(surface: Surface) -> list[float]:
    """Where a long surface is cut into the ends and the middle, as shares of side_u."""
    if abs(surface.side_u[0]) < 1e-9:
        return [0.0, 1.0]
    end = (SIZE_M[0] - MIDDLE_M) / 2 / SIZE_M[0]
    return [0.0, end, 1 - end, 1.0]


def _furniture(rng: np.random.Generator, side: int) -> list[Box]:
    """Crates and pictures in the end at negative (-1) or positive x (1), beside the way."""
    boxes = []
    for along in (0.0, 0.9, 1.8):
        for wall in (-1, 1):
            half = rng.uniform((0.15, 0.12, 0.2), (0.35, 0.28, 0.6))
            x = side * (SIZE_M[0] / 2 - 0.45 - along)
            crate = np.array([x, wall * (SIZE_M[1] / 2 - half[1] - 0.02), half[2]])
            boxes.append(Box('crate', crate, half, rng.normal(0, 0.05)))
            frame = np.array([rng.uniform(0.15, 0.35), 0.02, rng.uniform(0.15, 0.3)])
            picture = np.array([x, wall * (SIZE_M[1] / 2 - 0.021), rng.uniform(1.4, 1.9)])
            boxes.append(Box('picture', picture, frame, 0.0 if wall > 0 else np.pi))
    return boxes
