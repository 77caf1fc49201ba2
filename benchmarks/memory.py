"""Scene memories at equal bytes: landmark slots, coordinate network, and both together.

Keyframes are recorded once for each world and written into every memory, so that nothing but the
memory differs. Worlds: the kitchen, a building of many rooms that share one memory, and offices in
which the same things stand again and again. Queries: new views, and the same in harder conditions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, load_frames
from benchmarks.localisation import memories
from benchmarks.ours import map_frames
from benchmarks.places import CAMERA, WRONG
from benchmarks.scoring import extrapolation_split, interleaved_split
from feedforward_recon.config.schema import MemoryConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.evaluation import localisation_score
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, pose_error
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.synthetic.hardships import HARDSHIPS
from feedforward_recon.synthetic.office import aisle_walk, office
from feedforward_recon.types import Features, Frame, Keyframe

ROOMS, BUDGETS_MB = (1, 3, 10, 30), (1, 2, 4)
HARD_IN = 10  # rooms of the building in which the hard queries are asked too
FIRST_ROOM, APART_M, IN_A_ROW = 100, 20.0, 6  # rooms stand so far apart that none shows another
WALK, FPS = 60, 4.0  # images of each room
QUERIES, EACH = 50, 8  # in the first room, and in each room
NEW = 'new views'
OFFICES, OFFICE_WALK, OFFICE_QUERIES = (0, 1), 176, 60


@dataclass(frozen=True)
class Query:
    """An encoded image, its camera, and where it was taken."""

    features: Features
    camera: Camera
    T_map_cam: np.ndarray


World = tuple[list[Keyframe], dict[str, list[Query]]]


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """All worlds; rows are 'world, budget: queries | memory'."""
    encoder = CompactEncoder.load()
    for name, world in kitchen(encoder):
        yield from _measured(name, [world], 4, encoder)
    yield from _buildings(encoder)
    for same in (True, False):
        worlds = [_office(seed, encoder, same_things=same) for seed in OFFICES]
        for budget in BUDGETS_MB:
            yield from _measured(f'office, {"all" if same else "furniture"} alike', worlds, budget,
                                 encoder)


def _buildings(encoder: CompactEncoder) -> Iterator[tuple[str, dict[str, Any]]]:
    rooms = [_room(number, encoder, everything=number == 0) for number in range(max(ROOMS))]
    for count in ROOMS:
        keyframes = [keyframe for room, _ in rooms[:count] for keyframe in room]
        keyframes = [dataclasses.replace(k, id=i) for i, k in enumerate(keyframes)]
        queries = {f'first room, {kind}': some for kind, some in rooms[0][1].items()
                   if kind == NEW or count == HARD_IN}
        queries['all rooms'] = [query for _, asked in rooms[:count]
                                for query in asked[NEW][:EACH]]
        for budget in BUDGETS_MB:
            yield from _measured(f'building of {count}', [(keyframes, queries)], budget,
                                 encoder)


def _measured(name: str, worlds: Sequence[World], budget: int, encoder: CompactEncoder
              ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows over several worlds of one kind, each with a memory of its own."""
    for system, memory in memories(budget * 10**6).items():
        written = [write(keyframes, memory, encoder.dim) for keyframes, _ in worlds]
        finders = [Localizer(frozen, encoder, camera=keyframes[-1].camera)
                   for (frozen, _), (keyframes, _) in zip(written, worlds, strict=True)]
        cost = {'nbytes': written[0][0].nbytes,
                'write_ms': float(np.mean([seconds for _, seconds in written])) * 1e3}
        for kind in worlds[0][1]:
            asked = [(finder, query) for finder, (_, queries) in zip(finders, worlds, strict=True)
                     for query in queries[kind]]
            yield f'{name}, {budget} MB: {kind} | {system}', {**found(asked), **cost}


def write(keyframes: Sequence[Keyframe], config: MemoryConfig, dim: int
          ) -> tuple[SceneMemory, float]:
    """The memory of these keyframes, and CPU seconds of writing one, as a median."""
    writer, seconds = MemoryWriter(config, dim), []
    with one_thread():
        for keyframe in keyframes:
            started = time.process_time()
            writer.write(keyframe)
            seconds.append(time.process_time() - started)
    return writer.snapshot(), float(np.median(seconds))


def found(asked: Sequence[tuple[Localizer, Query]]) -> dict[str, Any]:
    """Scores of queries, each in its memory; search_ms: of one, after the image was encoded."""
    answers, seconds = [], []
    with one_thread():
        for finder, query in asked:
            started = time.perf_counter()
            estimate = finder.localize_features(query.features, query.camera).estimate
            seconds.append(time.perf_counter() - started)
            answers.append(estimate.T_map_cam)
    truth = [query.T_map_cam for _, query in asked]
    errors = [pose_error(answer, true) for answer, true in zip(answers, truth, strict=True)
              if answer is not None]
    score = localisation_score(answers, np.stack(truth))
    return {**dataclasses.asdict(score), 'search_ms': 1e3 * float(np.median(seconds)),
            'wrong': sum(metres > WRONG[0] or degrees > WRONG[1] for metres, degrees in errors)}


# -- worlds -------------------------------------------------------------------------------


def kitchen(encoder: CompactEncoder) -> Iterator[tuple[str, World]]:
    """Both splits of the kitchen; the hard queries are those beyond what was mapped."""
    frames = load_frames(KITCHEN)
    for split, (mapped, asked) in {'interleaved': interleaved_split(len(frames)),
                                   'extrapolation': extrapolation_split(len(frames))}.items():
        known, unknown = [frames[i] for i in mapped], [frames[i] for i in asked]
        keyframes = recorded(known)
        kinds = {} if split == 'interleaved' else HARDSHIPS
        yield f'kitchen {split}', (keyframes, asked_of(unknown, kinds, encoder,
                                                       keyframes[-1].camera))


def _room(number: int, encoder: CompactEncoder, *, everything: bool) -> World:
    """A room of the building; everything: more queries, and hard ones."""
    room = Room.generate(FIRST_ROOM + number)
    column, row = number % IN_A_ROW, number // IN_A_ROW
    T = make_transform(np.eye(3), APART_M * np.array([column, row, 0.0]))
    walk = room.walk(WALK, seed=0, fps=FPS)
    known = _moved(render_walk(room, CAMERA, walk, noise=2.0, exposure_drift=0.1), T)
    views = room.held_out_views(walk, QUERIES if everything else EACH, seed=3)
    unknown = _moved(render_walk(room, CAMERA, views, noise=2.0), T)
    return recorded(known), asked_of(unknown, HARDSHIPS if everything else {}, encoder)


def _office(seed: int, encoder: CompactEncoder, *, same_things: bool) -> World:
    room = office(seed, same_things=same_things)
    walk = aisle_walk(room, OFFICE_WALK, seed=0)
    known = list(render_walk(room, CAMERA, walk, noise=2.0, exposure_drift=0.1))
    views = room.held_out_views(walk, OFFICE_QUERIES, seed=3)
    return recorded(known), asked_of(list(render_walk(room, CAMERA, views, noise=2.0)),
                                              {}, encoder)


def _moved(frames: Iterator[Frame], T: np.ndarray) -> list[Frame]:
    return [dataclasses.replace(frame, T_map_cam=T @ frame.T_map_cam) for frame in frames]


def recorded(frames: Sequence[Frame]) -> list[Keyframe]:
    """Keyframes of a walk with given poses, as they are when mapping has ended."""
    return list(map_frames(frames, given_poses=True).scene.keyframes)


def asked_of(frames: Sequence[Frame], hardships: dict[str, Any], encoder: CompactEncoder,
             lens: Camera | None = None) -> dict[str, list[Query]]:
    """Queries of frames as they are, and of their harder versions; lens: as the map knows it."""
    kinds = {NEW: list(frames)}
    for kind, worse in hardships.items():
        kinds[kind] = [worse(frame, number) for number, frame in enumerate(frames)]
    return {kind: [_query(frame, encoder, lens) for frame in some]
            for kind, some in kinds.items()}


def _query(frame: Frame, encoder: CompactEncoder, lens: Camera | None) -> Query:
    assert frame.camera is not None and frame.T_map_cam is not None
    camera = frame.camera if lens is None else frame.camera.with_distortion_of(lens)
    return Query(encoder.encode(frame.image), camera, frame.T_map_cam)
