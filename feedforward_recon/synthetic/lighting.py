"""Light that lies on the surfaces: lamps, soft shadows and darker corners.

Surfaces are matt and lamps do not move, so brightness does not depend on the viewer: it is
computed once per face on a coarse grid and multiplied into the texture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.synthetic.layout import Box

CORNER_M = 0.2
LAMP_SAMPLES = 4
GRID_M = 0.08


@dataclass(frozen=True)
class Lamp:
    """A round lamp: centre [3] and radius in metres, RGB intensity [3] at a distance of 1 m."""

    centre: NDArray[np.float64]
    radius: float
    rgb: NDArray[np.float64]


def to_boxes(boxes: list[Box]) -> tuple[NDArray, NDArray, NDArray]:
    """Centres [B, 3], rotations box <- world [B, 3, 3] and half sizes [B, 3], for vector code."""
    centres = np.stack([box.centre for box in boxes])
    rotations = np.stack([box.R_world_box.T for box in boxes])
    return centres, rotations, np.stack([box.half for box in boxes])


def clearance(points: NDArray, size: NDArray, boxes: list[Box]) -> NDArray[np.float64]:
    """Distance [N] of points [N, 3] to the nearest surface; negative inside a box or wall."""
    points = np.asarray(points, float)
    low = points - np.array([-size[0] / 2, -size[1] / 2, 0.0])
    nearest = np.minimum(low, size - low).min(1)
    if not boxes:
        return nearest
    centres, rotations, halves = to_boxes(boxes)
    local = np.einsum('bij,nbj->nbi', rotations, points[:, None] - centres)
    q = np.abs(local) - halves
    outside = np.linalg.norm(np.maximum(q, 0), axis=-1)
    return np.minimum(nearest, (outside + np.minimum(q.max(-1), 0)).min(1))


def first_hit(origins: NDArray, directions: NDArray, boxes: list[Box]) -> NDArray[np.float64]:
    """Smallest t >= 0 [N] at which origin + t * direction meets a box, inf where none does."""
    if not boxes:
        return np.full(len(origins), np.inf)
    centres, rotations, halves = to_boxes(boxes)
    local_o = np.einsum('bij,nbj->nbi', rotations, origins[:, None] - centres)
    local_d = np.einsum('bij,nj->nbi', rotations, directions)
    local_d = np.where(np.abs(local_d) < 1e-12, 1e-12, local_d)
    a, b = (-halves - local_o) / local_d, (halves - local_o) / local_d
    enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
    hit = (enter <= leave) & (enter >= 0)
    return np.where(hit, enter, np.inf).min(1)


def lamps(rng: np.random.Generator, size: NDArray) -> list[Lamp]:
    """One to three lamps below the ceiling, warm to cool."""
    count = int(rng.integers(1, 4))
    found = []
    for _ in range(count):
        centre = np.array([*(rng.uniform(-0.3, 0.3, 2) * size[:2]), size[2] - 0.1])
        warmth = rng.uniform(-0.12, 0.06)
        tint = np.array([1 - warmth, 1.0, 1 + warmth])
        found.append(Lamp(centre, 0.3, tint * rng.uniform(3.0, 4.4) / count))
    return found


def irradiance(corner: NDArray, side_u: NDArray, side_v: NDArray, size: NDArray,
               boxes: list[Box], lights: list[Lamp]) -> NDArray[np.float32]:
    """RGB brightness [h, w, 3] over a face, on a grid of about ``GRID_M``.

    corner [3], side_u, side_v [3]: the face's upper left corner and sides in metres, world.
    """
    length_u, length_v = np.linalg.norm(side_u), np.linalg.norm(side_v)
    shape = [int(np.clip(length / GRID_M, 2, 64)) for length in (length_v, length_u)]
    v, u = ((np.arange(n) + 0.5) / n for n in shape)
    normal = -np.cross(side_u, side_v) / (length_u * length_v)
    points = (corner + v[:, None, None] * side_v + u[None, :, None] * side_u).reshape(-1, 3)
    open_air = clearance(points + CORNER_M * normal, size, boxes) / CORNER_M
    ambient = 0.58 * (0.5 + 0.5 * np.clip(open_air, 0, 1)) * (1 + 0.12 * normal[2])
    light = np.repeat(ambient[:, None], 3, 1)
    rng = np.random.default_rng(1)  # one fixed sampling pattern for every lamp and face
    blockers = [box for box in boxes if box.half.min() > 0.01]
    for lamp in lights:
        for _ in range(LAMP_SAMPLES):
            angle, radius = rng.uniform(0, 2 * np.pi), lamp.radius * np.sqrt(rng.uniform())
            source = lamp.centre + radius * np.array([np.cos(angle), np.sin(angle), 0.0])
            ray = source - points
            distance = np.linalg.norm(ray, axis=1)
            lambert = np.maximum(ray @ normal, 0) / distance
            lit = lambert > 0
            if lit.any():
                lit[lit] = first_hit(points[lit] + 2e-3 * normal, ray[lit], blockers) >= 1
            # A softened inverse square: real rooms are evened out by light from the walls.
            amount = lit * lambert / (1 + distance**2) / LAMP_SAMPLES
            light += amount[:, None] * lamp.rgb
    return light.reshape(*shape, 3).astype(np.float32)
