"""Three sessions in one map against one run over the same images.

    python -m benchmarks.run_all sessions

Each session localises itself in the map that the one before saved, and extends it. Measured for
each session: its error, that of the same images in a map of their own, and in one run over all
images, each after an alignment of its own; the recall of images beside the first session's
(every second image is held out), in the map as it is then; and last the keyframes of all
sessions after one alignment, which tells how well they share a frame (against all images of the
one run, not its keyframes alone). Means over walks, forwards and backwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, backwards, load_frames, true_trajectory
from benchmarks.ours import alignment_to
from feedforward_recon.console.threads import one_thread
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.align import Alignment
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import KEYFRAMES, MEMORY, SavedMap
from feedforward_recon.session.offline import map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame, Trajectory

SESSIONS, OVERLAP = 3, 0.15  # share of the walk by which sessions overlap
RECALL_M = 0.05
ROOMS, WALK = (21, 22), 240
Row = dict[str, Any]


def room_walk(seed: int) -> list[Frame]:
    """One turn around a rendered room, with depth."""
    room, fps = Room.generate(seed), 7.0
    return list(render_walk(room, Camera.from_fov(68.0, (480, 360)), room.walk(WALK, 0, fps),
                            fps=fps, noise=1.0, seed=1))


def parts(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Consecutive parts of a walk that overlap."""
    length = len(frames) / SESSIONS
    overlap = OVERLAP * len(frames) / 2
    return [list(frames[max(0, round(i * length - overlap)):round((i + 1) * length + overlap)])
            for i in range(SESSIONS)]


def recall(saved: SavedMap, queries: Sequence[Frame], fit: Alignment) -> float:
    """Share of queries that are found within 5 cm of their true place."""
    localizer, good = saved.localizer(), 0
    for query in queries:
        T = localizer.localize(replace(query, depth=None, T_map_cam=None)).T_map_cam
        if T is not None and query.T_map_cam is not None:
            at = fit.apply_to_poses(T[None])[0, :3, 3]
            good += float(np.linalg.norm(at - query.T_map_cam[:3, 3])) < RECALL_M
    return good / len(queries)


def measured(frames: Sequence[Frame], depth: bool, encoder: CompactEncoder) -> list[Row]:
    """Figures of the sessions of one walk, in their order."""
    shown = [f if depth else replace(f, depth=None) for f in frames]
    mapped, held_out = shown[::2], shown[1::2]
    one = map_frames(mapped, encoder=encoder).scene.trajectory
    first, *_, last = parts(mapped)[0]
    queries = [f for f in held_out if first.stamp_ns < f.stamp_ns < last.stamp_ns][::2]
    rows, before = [], None
    with tempfile.TemporaryDirectory() as root:
        for number, part in enumerate(parts(mapped)):
            run = map_frames(part, encoder=encoder, into=before)
            before = run.save(Path(root) / str(number))
            alone = map_frames(part, encoder=encoder).scene.trajectory if number else \
                run.scene.trajectory
            rows.append({**_errors(run.scene.trajectory, alone, one, part, depth),
                         **_map_figures(before, run.scene, mapped, queries, depth)})
    everything = keyframe_poses(run.scene)
    return [*rows, {'images': len(mapped), 'tracked': len(everything),
                    **_errors(everything, one, one, mapped, depth)}]


def _errors(found: Trajectory, alone: Trajectory, one: Trajectory, frames: Sequence[Frame],
            depth: bool) -> Row:
    """Errors of a session, of a map of the same images alone, and of the one run."""
    truth, alignment = true_trajectory(list(frames)), 'se3' if depth else 'sim3'
    return {name: absolute_trajectory_error(trajectory, truth, alignment).rmse for
            name, trajectory in
            (('ate_m', found), ('ate_alone_m', alone), ('ate_one_run_m', one))}


def _map_figures(saved: SavedMap, scene: SceneMap, mapped: Sequence[Frame],
                 queries: Sequence[Frame], depth: bool) -> Row:
    """What the map holds after a session, and what it finds of the first one."""
    fit = alignment_to(true_trajectory(list(mapped)), keyframe_poses(scene),
                       with_scale=not depth)
    files = saved.info.files
    return {'images': len(scene.estimates), 'tracked': len(scene.trajectory),
            'queries': len(queries), 'recall_5cm': recall(saved, queries, fit),
            'keyframes': saved.info.keyframes, 'memory_bytes': files[MEMORY]['bytes'],
            'keyframes_bytes': files[KEYFRAMES]['bytes']}


def keyframe_poses(scene: SceneMap) -> Trajectory:
    """Keyframes of all sessions, where the map has them now."""
    return Trajectory(np.array([k.stamp_ns for k in scene.keyframes], np.int64),
                      np.stack([k.T_map_cam for k in scene.keyframes]))


def run() -> Iterator[tuple[str, Row]]:
    """One row per kind of walk and session, with and without depth; means over the walks."""
    encoder = CompactEncoder.load()
    walks = {'synthetic rooms': [walk for seed in ROOMS for walk in _both_ways(room_walk(seed))],
             'kitchen': _both_ways(load_frames(KITCHEN))}
    with one_thread():
        for name, ways in walks.items():
            for depth in (True, False):
                found = [measured(frames, depth, encoder) for frames in ways]
                for number, rows in enumerate(zip(*found, strict=True), 1):
                    session = f'session {number}' if number <= SESSIONS else 'all keyframes'
                    yield (f'{name}, {"depth" if depth else "monocular"} | {session}',
                           _mean(rows))


def _both_ways(frames: list[Frame]) -> list[list[Frame]]:
    return [frames, backwards(frames)]


def _mean(rows: Sequence[Row]) -> Row:
    mean: Row = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {**mean, 'walks': len(rows), 'ratio': mean['ate_m'] / mean['ate_one_run_m'],
            'ratio_alone': mean['ate_m'] / mean['ate_alone_m']}
