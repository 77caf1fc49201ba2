"""Things that are elsewhere in every view of a room: boxes that stand before its cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.transforms import inverse, make_transform
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.room import Room, box_faces
from feedforward_recon.synthetic.views import MovingFaces

HALF_M = (0.1, 0.08, 0.25), (0.3, 0.25, 0.85)  # as a bin to as a person
DISTANCE_M, ASIDE_RAD = (1.0, 2.4), 0.45  # from the camera that it stands before
STEP_M, TURN_RAD = 0.2, 0.5  # standard deviations from view to view


@dataclass(frozen=True)
class MovingThings:
    """A room with things that move; the room has them in the middle of the floor.

    Neither its free space nor its light knows of them. boxes: as the room has them, in the order
    of its last faces.
    """

    room: Room
    boxes: Sequence[Box]

    @staticmethod
    def drawn(room: Room, count: int, rng: np.random.Generator) -> MovingThings:
        """The room with ``count`` of them."""
        halves = rng.uniform(*HALF_M, (count, 3))
        boxes = [Box('object', np.array([0, 0, half[2]]), half) for half in halves]
        faces = [*room.faces, *box_faces(rng, boxes)]
        return MovingThings(replace(room, faces=faces, pyramids={}), boxes)

    def before(self, anchors: NDArray[np.float64], rng: np.random.Generator) -> list[MovingFaces]:
        """Their motions, for views near poses T_world_cam [V, 4, 4]: each stands before one.

        From view to view they make a small step and turn; they stay on the floor of the room.
        """
        first = len(self.room.faces) - 6 * len(self.boxes)
        return [MovingFaces(range(first + 6 * k, first + 6 * k + 6),
                            self._motion(box, anchors, rng)) for k, box in enumerate(self.boxes)]

    def _motion(self, box: Box, anchors: NDArray, rng: np.random.Generator) -> NDArray:
        distance, aside = rng.uniform(*DISTANCE_M), rng.uniform(-ASIDE_RAD, ASIDE_RAD)
        heading = np.arctan2(anchors[:, 1, 2], anchors[:, 0, 2]) + aside
        place = anchors[:, :2, 3] + distance * np.stack([np.cos(heading), np.sin(heading)], 1)
        place += rng.normal(0, STEP_M, place.shape)
        free = self.room.size[:2] / 2 - box.reach
        place = np.clip(place, -free, free)
        yaw = rng.uniform(0, 2 * np.pi) + rng.normal(0, TURN_RAD, len(anchors))
        away = inverse(make_transform(np.eye(3), box.centre))
        return np.stack([make_transform(Box(box.kind, box.centre, box.half, turn).R_world_box,
                                        np.append(xy, box.centre[2])) @ away
                         for xy, turn in zip(place, yaw, strict=True)])
