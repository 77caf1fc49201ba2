"""What tables are made of, for us and the peers alike: walks, splits, rows and their means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.common import Clock
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.evaluation import absolute_trajectory_error, localisation_score
from feedforward_recon.types import Frame, Trajectory

Row = dict[str, Any]


@dataclass(frozen=True)
class Walked:
    """What a system made of a walk.

    live: poses as they came with the images, before anything was refined. trajectory: poses of
    all images in the end; the live ones where a system has no others. refined: poses of the
    finished map, of all images or of its keyframes alone. keyframes_ns: stamps [K].
    cpu_seconds: of all threads, without reading images. latency_ms: median from an image to its
    pose, by the clock. unsure_live, unsure: stamps of poses of ``live`` and ``trajectory`` that
    the system itself does not vouch for.
    """

    live: Trajectory
    trajectory: Trajectory
    refined: Trajectory
    keyframes_ns: np.ndarray
    cpu_seconds: float
    latency_ms: float
    unsure_live: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    unsure: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def walk_entry(walked: Walked, truth: Trajectory, alignment: str, total: int,
               moments_ns: np.ndarray) -> Row:
    """Row of the mapping table for one walk of ``total`` images.

    moments_ns: stamps of the peer's keyframes, at which refined poses are compared.
    """
    at = np.isin(truth.stamps_ns, moments_ns)
    at_keyframes = Trajectory(truth.stamps_ns[at], truth.T_map_cam[at])
    return {'alignment': alignment, 'images': total, 'tracked': len(walked.trajectory),
            'tracked_live': len(walked.live), 'keyframes': len(walked.keyframes_ns),
            'cpu_seconds': walked.cpu_seconds, 'latency_ms': walked.latency_ms,
            'error': trajectory_error(walked.trajectory, truth, alignment),
            'live_error': trajectory_error(walked.live, truth, alignment),
            'keyframe_error': trajectory_error(walked.refined, at_keyframes, alignment)}


def trajectory_error(estimated: Trajectory, truth: Trajectory, alignment: str) -> Row | None:
    """Figures of a trajectory; None where too little was tracked to be compared."""
    try:
        return dataclasses.asdict(absolute_trajectory_error(estimated, truth, alignment))
    except (InputError, DegenerateError):
        return None


def mean_entry(rows: Mapping[str, Row]) -> Row:
    """Means of rows over walks {name: row}, the spread of the error, and the rows themselves.

    An error that is missing in one of the walks is missing in the mean.
    """
    mean = _mean(list(rows.values()))
    errors = [row['error'] and row['error']['rmse'] for row in rows.values()]
    spread = float(np.std(errors)) if None not in errors and len(errors) > 1 else None
    return {**mean, 'spread': spread, 'walks': len(rows), 'each': dict(rows)}


def _mean(values: Sequence[Any]) -> Any:
    """Means of numbers, key by key; what is no number is that of the first."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return values[0] if isinstance(values[0], str) else float(np.mean(values))


# What is compared: below 1 the first is better, but for ``tracked``.
COMPARED = {'ATE': 'error.rmse', 'rotation': 'error.rotation_median_deg',
            'live ATE': 'live_error.rmse', 'live rotation': 'live_error.rotation_median_deg',
            'keyframe ATE': 'keyframe_error.rmse', 'tracked': 'tracked',
            'CPU': 'cpu_seconds', 'latency': 'latency_ms'}


def ratios(ours: Row, peer: Row) -> dict[str, float | None]:
    """Ours over the peer's for each of COMPARED; None where one of them has none."""
    both = {name: (value_at(ours, key), value_at(peer, key)) for name, key in COMPARED.items()}
    return {name: None if mine is None or not theirs else mine / theirs
            for name, (mine, theirs) in both.items()}


def value_at(row: Row, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = row
    for part in key.split('.'):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def interleaved_split(count: int, block: int = 25, every: int = 4
                      ) -> tuple[np.ndarray, np.ndarray]:
    """Indices to map and to query: of every ``every`` blocks of images the last is query."""
    query = np.arange(count) // block % every == every - 1
    return np.flatnonzero(~query), np.flatnonzero(query)


def extrapolation_split(count: int, mapped: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Indices to map and to query: the walk is mapped up to a share of it, then queried."""
    first = round(count * mapped)
    return np.arange(first), np.arange(first, count)


def localisation_entry(localise: Callable[[Frame], np.ndarray | None], queries: list[Frame],
                       nbytes: int, mapping: Clock) -> dict[str, Any]:
    """Score and median time of a query on frames with true poses."""
    clocks, answers = [], []
    with one_thread():  # as in the nodes and the command
        for frame in queries:
            clock = Clock()
            answers.append(localise(frame))
            clocks.append(clock.stop())
    truth = np.stack([f.T_map_cam for f in queries if f.T_map_cam is not None])
    return {**dataclasses.asdict(localisation_score(answers, truth)), 'nbytes': nbytes,
            'query_ms': 1e3 * float(np.median([clock.seconds for clock in clocks])),
            'query_cpu_ms': 1e3 * float(np.median([clock.cpu_seconds for clock in clocks])),
            'map_seconds': mapping.seconds, 'map_cpu_seconds': mapping.cpu_seconds}
