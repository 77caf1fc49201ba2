"""Refining a whole map while frames come: a skeleton of its keyframes, piece by piece.

Bundle adjustment of a subset of keyframes and landmarks, which the others follow, in the spirit
of skeletal graphs (Snavely et al. 2008). The map may grow between the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.posegraph import PoseGraph
from feedforward_recon.geometry.refine import bundle_pieces
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.adjustment import bundle_problem, change_lens, refine_points
from feedforward_recon.mapping.map import GrowingMap

# The next three: docs/experiments.md, A loop closed in pieces.
# Keyframes that bundle adjustment moves after the pose graph, and older ones that stay fixed.
SKELETON, FIXED = 100, 20
# Landmarks that take part, each counted once per keyframe: they bound the cost of a step.
BEST = 10_000


@dataclass(frozen=True)
class Correction:
    """Keyframes that were at ``T_before`` [K, 4, 4] belong at ``after``, with scales.

    radial: what their lens bends beyond what was known, as in ``bundle_rows``.
    """

    T_before: np.ndarray
    after: PoseGraph
    radial: float = 0.0


def apply_correction(map_: GrowingMap, correction: Correction) -> np.ndarray:
    """Move all keyframes and their landmarks; returns the scale of each keyframe [K].

    A keyframe that was refined in the meantime keeps what it gained, and those that came
    later move with the last one that the correction knew.
    """
    known = np.minimum(np.arange(len(map_)), len(correction.T_before) - 1)
    scale = correction.after.scale[known]
    gained = inverse(correction.T_before)[known] @ map_.T_map_cam
    gained[:, :3, 3] *= scale[:, None]
    map_.T_map_cam = correction.after.T_map_cam[known] @ gained
    map_.landmarks.point_cam *= scale[map_.landmarks.anchor][:, None]
    if correction.radial:
        change_lens(map_, 1.0, correction.radial)
    return scale


def refine_skeleton(map_: GrowingMap, config: MapperConfig,
                    corrected: Callable[[np.ndarray], None], calibration: tuple[str, ...] = ()
                    ) -> Iterator[None]:
    """The skeleton of the map, then all landmarks from all their views, in bounded pieces.

    corrected: called with the scale of each keyframe [K] when keyframes have moved.
    calibration: as in ``adjust_skeleton``.
    """
    for correction in adjust_skeleton(map_, config, calibration):
        if correction is None:
            yield
        else:
            corrected(apply_correction(map_, correction))
    yield from refine_points(map_, config)


def adjust_skeleton(map_: GrowingMap, config: MapperConfig, calibration: tuple[str, ...] = ()
                    ) -> Iterator[Correction | None]:
    """Bundle adjustment of every few keyframes and their best landmarks.

    The others move with the nearest of them. All landmarks of all keyframes would cost ten
    times as much and end in the same place. The map is only read, and may grow between the pieces.
    calibration: () or the lens, ('radial',).
    """
    count = len(map_)
    newest = np.arange(max(1, count - config.refine.max_keyframes), count)
    free = newest[::-1][::-(-len(newest) // SKELETON)][::-1]
    T_before = map_.T_map_cam.copy()
    table = map_.landmarks
    used = np.zeros(count, bool)
    used[free] = True
    shared = table.shared(table.seen_landmark[used[table.seen_keyframe]], count)
    shared[newest] = 0
    shared[0] = count + shared.max()
    fixed = np.argsort(-shared, kind='stable')[:FIXED]
    fixed = fixed[shared[fixed] > 0]
    used[fixed] = True
    problem, *_ = bundle_problem(map_, config, free, fixed, _best_landmarks(map_, used),
                                 calibration)
    if problem is None:
        return
    for result in bundle_pieces(problem, config.refine.loop_steps):
        if result is None:
            yield None
        else:
            middle = (free[1:] + free[:-1] + 1) // 2
            nearest = np.searchsorted(middle, np.arange(count), 'right')
            motion = result.T_map_cam[:len(free)] @ inverse(T_before[free])
            after = motion[nearest] @ T_before
            after[:free[0]] = T_before[:free[0]]
            yield Correction(T_before, PoseGraph(after, np.ones(count)), result.radial)


def _best_landmarks(map_: GrowingMap, used: np.ndarray) -> np.ndarray:
    """Landmarks seen from the most distant keyframes, as many of each used one (mask [K])."""
    table = map_.landmarks
    rows = np.flatnonzero(used[table.seen_keyframe] & table.has_point[table.seen_landmark])
    landmark, keyframe = table.seen_landmark[rows], table.seen_keyframe[rows]
    first, last = np.full(len(table), len(map_)), np.zeros(len(table), int)
    np.minimum.at(first, landmark, keyframe)
    np.maximum.at(last, landmark, keyframe)
    order = np.lexsort((first[landmark] - last[landmark], keyframe))
    start = np.searchsorted(keyframe[order], np.arange(len(map_)))
    rank = np.arange(len(rows)) - start[keyframe[order]]
    return np.unique(landmark[order[rank < BEST // used.sum()]])
