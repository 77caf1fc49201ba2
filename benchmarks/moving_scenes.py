"""Rendered photos of rooms in which boxes move, and which pixels show a box."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.room import Room, box_faces
from feedforward_recon.synthetic.stress import CAMERA, CASES, STEPS
from feedforward_recon.types import Frame

IMAGES, EVERY = 40, 8  # photos of a walk, and how many of its images from one to the next
MOVED, SHIFT_M = 8, 0.6  # places where a box may stand, and how far it is moved
BEFORE_WALL_M, CLEARANCE_M = 0.5, 0.6
HALF_M = np.array([0.4, 0.3, 0.8])
NOISE, GREY = 1.0, 128  # grey levels: of the sensor, and of what is covered
NEARER_M = 1e-3  # than the room: a box
HAPPENINGS = {
    'still': 'no boxes', 'crossing': 'two boxes cross the view of the camera',
    'covered': 'the same pixels are grey', 'moved': 'each box is moved between two visits'}


@dataclass(frozen=True)
class BoxPhotos:
    """Shuffled images without depth, whose stamps k are those of the walk.

    boxes: bool [N, H, W], pixels of image k that show a box.
    """

    frames: list[Frame]
    boxes: np.ndarray


def box_photos(happening: str, seed: int) -> BoxPhotos:
    """Photos of one of ``HAPPENINGS``; of the same seed all have the same room and poses.

    With 'moved', every second image is of the second visit.
    """
    rng = np.random.default_rng(seed)
    plan = CASES['moving_boxes'](rng, np.random.default_rng(seed), IMAGES * EVERY)
    poses = plan.poses[::STEPS * EVERY]
    visits = moved_boxes(plan.room, poses, rng)
    frames, masks = [], []
    for k, T_map_cam in enumerate(poses):
        boxes = {'still': [], 'moved': visits[k % 2]}.get(happening, plan.intruders(k * EVERY))
        image, box = rendered(plan.room, boxes, T_map_cam)
        if happening == 'covered':
            image[box] = GREY
        noisy = np.clip(np.rint(image + rng.normal(0, NOISE, image.shape)), 0, 255)
        frames.append(Frame(k, noisy.astype(np.uint8), None, CAMERA, f'{k:02d}', T_map_cam))
        masks.append(box)
    return BoxPhotos([frames[k] for k in rng.permutation(len(frames))], np.stack(masks))


def rendered(room: Room, boxes: list[Box], T_map_cam: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] of a room with more boxes, and which pixels [H, W] show one of them."""
    faces = box_faces(np.random.default_rng(room.seed), boxes)
    image, depth = replace(room, faces=[*room.faces, *faces]).render(CAMERA, T_map_cam)
    return image, depth < room.render(CAMERA, T_map_cam)[1] - NEARER_M


def moved_boxes(room: Room, poses: np.ndarray, rng: np.random.Generator
                ) -> tuple[list[Box], list[Box]]:
    """Boxes in front of what a walk [N, 4, 4] looks at, then the same ones moved sidewards."""
    visits: tuple[list[Box], list[Box]] = [], []
    for T_map_cam in poses[::len(poses) // MOVED]:
        ahead = T_map_cam[:2, 2] / np.linalg.norm(T_map_cam[:2, 2])
        depth = room.render(CAMERA, T_map_cam)[1][CAMERA.height // 2, CAMERA.width // 2]
        middle = T_map_cam[:2, 3] + (depth - BEFORE_WALL_M) * ahead
        side = rng.choice([-1, 1]) * SHIFT_M / 2 * np.array([-ahead[1], ahead[0]])
        places = middle - side, middle + side
        if min(np.linalg.norm(poses[:, :2, 3] - place, axis=1).min() for place in places) \
                < CLEARANCE_M:
            continue
        for boxes, place in zip(visits, places, strict=True):
            yaw = np.arctan2(-ahead[0], ahead[1]) + rng.uniform(-0.3, 0.3)
            boxes.append(Box('object', np.r_[place, HALF_M[2]], HALF_M, float(yaw)))
    return visits
