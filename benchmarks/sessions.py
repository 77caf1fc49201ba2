"""Three sessions in one map against one run over the same images.

    python -m benchmarks.run_all sessions

Each session localises itself in the map that the one before saved, and extends it. Measured in
the frame of the map, with the one alignment that the whole walk of all sessions gives: the error
of each session, that of the same images in one run, and the recall of images beside the first
session's (every second image is held out), after each session.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, data_root, load_frames
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.geometry.align import Alignment, align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import KEYFRAMES, MEMORY, SavedMap
from feedforward_recon.session.offline import map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame, Trajectory

SESSIONS, OVERLAP = 3, 0.15  # share of the walk by which sessions overlap
RECALL_M = 0.05
ROOM, WALK = 21, 240


def synthetic_walk() -> list[Frame]:
    """One turn around a room of its own, with depth."""
    room, fps = Room.generate(ROOM), 7.0
    return list(render_walk(room, Camera.from_fov(68.0, (480, 360)), room.walk(WALK, 0, fps),
                            fps=fps, noise=1.0, seed=1))


def kitchen_walk() -> list[Frame]:
    """The kitchen with the truth of structure from motion."""
    text = (data_root() / KITCHEN / 'cameras_sfm.json').read_text(encoding='utf-8')
    poses = {Path(entry['file']).name: np.array(entry['T_world_camera'])
             for entry in json.loads(text)['frames']}
    return [replace(frame, T_map_cam=poses.get(Path(frame.source).name))
            for frame in load_frames(KITCHEN)]


def parts(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Consecutive parts of a walk that overlap."""
    length = len(frames) / SESSIONS
    overlap = OVERLAP * len(frames) / 2
    return [list(frames[max(0, round(i * length - overlap)):round((i + 1) * length + overlap)])
            for i in range(SESSIONS)]


def centres(trajectory: Trajectory, frames: Sequence[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Found and true positions [N, 3] of the frames that have both."""
    true = {f.stamp_ns: f.T_map_cam[:3, 3] for f in frames if f.T_map_cam is not None}
    rows = [i for i, stamp in enumerate(trajectory.stamps_ns) if stamp in true]
    return (trajectory.positions[rows],
            np.array([true[trajectory.stamps_ns[i]] for i in rows]))


def rmse(fit: Alignment, found: np.ndarray, true: np.ndarray) -> float:
    """Root mean square position error after an alignment, metres."""
    poses = np.tile(np.eye(4), (len(found), 1, 1))
    poses[:, :3, 3] = found
    off = fit.apply_to_poses(poses)[:, :3, 3] - true
    return float(np.sqrt((off**2).sum(1).mean()))


def recall(saved: SavedMap, queries: Sequence[Frame], fit: Alignment) -> float:
    """Share of queries that are found within 5 cm of their true place."""
    localizer, good = saved.localizer(), 0
    for query in queries:
        T = localizer.localize(replace(query, depth=None, T_map_cam=None)).T_map_cam
        if T is not None and query.T_map_cam is not None:
            at = fit.apply_to_poses(T[None])[0, :3, 3]
            good += float(np.linalg.norm(at - query.T_map_cam[:3, 3])) < RECALL_M
    return good / len(queries)


def measured(frames: Sequence[Frame], depth: bool, encoder: CompactEncoder
             ) -> list[dict[str, Any]]:
    """Figures of the sessions of one walk, in their order."""
    shown = [f if depth else replace(f, depth=None) for f in frames]
    mapped, held_out, config = shown[::2], shown[1::2], MapperConfig()
    one = map_frames(mapped, config, encoder).scene.trajectory
    saved: list[SavedMap] = []
    with tempfile.TemporaryDirectory() as root:
        for number, part in enumerate(parts(mapped)):
            walk = map_frames(part, config, encoder, into=saved[-1] if saved else None)
            saved.append(walk.save(Path(root) / str(number)))
        return _rows(saved, one, mapped, held_out, depth)


def _rows(saved: list[SavedMap], one: Trajectory, mapped: Sequence[Frame],
          held_out: Sequence[Frame], depth: bool) -> list[dict[str, Any]]:
    sessions = parts(mapped)
    fit_one = align_points(*centres(one, mapped), with_scale=not depth)
    pairs = [centres(m.trajectory(), part) for m, part in zip(saved, sessions, strict=True)]
    fit = align_points(*(np.concatenate([pair[i] for pair in pairs]) for i in (0, 1)),
                       with_scale=not depth)
    first, last = sessions[0][0].stamp_ns, sessions[0][-1].stamp_ns
    queries = [f for f in held_out if first < f.stamp_ns < last][::2]
    rows = []
    for m, part, pair in zip(saved, sessions, pairs, strict=True):
        ate_m, ate_one_m = rmse(fit, *pair), rmse(fit_one, *centres(one, part))
        rows.append({'images': len(part), 'tracked': len(m.trajectory()), 'ate_m': ate_m,
                     'ate_one_run_m': ate_one_m, 'ratio': ate_m / ate_one_m,
                     'queries': len(queries), 'recall_5cm': recall(m, queries, fit),
                     'keyframes': m.info.keyframes,
                     'memory_bytes': m.info.files[MEMORY]['bytes'],
                     'keyframes_bytes': m.info.files[KEYFRAMES]['bytes']})
    return rows


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """One row per walk and session, with and without depth."""
    encoder = CompactEncoder.load()
    walks = {'synthetic room': synthetic_walk(), 'kitchen': kitchen_walk()}
    with one_thread():
        for name, frames in walks.items():
            for depth in (True, False):
                rows = measured(frames, depth, encoder)
                for number, row in enumerate(rows, 1):
                    yield f'{name}, {"depth" if depth else "monocular"} | session {number}', row
