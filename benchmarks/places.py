"""False places: an office of like cubicles, of which half is mapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.localisation import memories, nbytes
from benchmarks.ours import Answerer, map_frames
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.synthetic.office import aisle_walk, office
from feedforward_recon.types import Frame

SEEDS = (0, 1)
MAPPED = 176  # images of a walk past all cubicles, of which the first half is mapped
QUERIES = 60  # for each office and kind
BEYOND_M = 1.0  # from the middle: cubicles that no mapped image was near
WRONG = 0.2, 10.0  # metres and degrees
CAMERA = Camera.from_fov(65.0, (640, 480))


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Offices in which all is alike, then those in which only the furniture is."""
    default = MapperConfig()
    network = dataclasses.replace(default, memory=memories(nbytes(default.memory))['hybrid'])
    for label, same_things in (('all alike', True), ('like furniture', False)):
        for suffix, config in (('', default), (', with network', network)):
            rows = [_office(seed, same_things, config) for seed in SEEDS]
            for kind in rows[0]:
                counts = [row[kind] for row in rows]
                yield f'office, {label} | {kind}{suffix}', {
                    key: sum(count[key] for count in counts) for key in counts[0]}


def _office(seed: int, same_things: bool, config: MapperConfig) -> dict[str, dict[str, int]]:
    """Map the left half of an office and ask for views of both halves."""
    room = office(seed, same_things=same_things)
    walk = aisle_walk(room, MAPPED, seed=0)
    left = [pose for pose in walk if pose[0, 3] < 0]
    right = [pose for pose in walk if pose[0, 3] > BEYOND_M]
    answer = Answerer(map_frames(_views(room, left), config, given_poses=True))
    return {'between mapped views': answered(answer, _views(room, room.held_out_views(
                left, QUERIES, seed=3))),
            'cubicles not mapped': answered(answer, _views(room, room.held_out_views(
                right, QUERIES, seed=2)))}


def _views(room: Room, poses: list[Any]) -> list[Frame]:
    return list(render_walk(room, CAMERA, poses, noise=2.0, exposure_drift=0.1))


def answered(answer: Answerer, queries: list[Frame]) -> dict[str, int]:
    """How many queries got a pose, and how many of the poses are of another place."""
    poses = [(answer(frame), frame.T_map_cam) for frame in queries]
    errors = [pose_error(found, true) for found, true in poses
              if found is not None and true is not None]
    wrong = sum(metres > WRONG[0] or degrees > WRONG[1] for metres, degrees in errors)
    return {'queries': len(queries), 'answered': len(errors), 'wrong': wrong}
