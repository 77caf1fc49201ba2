"""Loop closure: recognise an old place, verify it geometrically, correct poses and points.

Retrieval by global descriptor, verification by PnP, then a pose graph over covisible keyframes
(Strasdat et al. 2010; the scale is free in monocular maps), and bundle adjustment of a skeleton of
the map.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit, pnp_ransac
from feedforward_recon.geometry.posegraph import (
    PoseGraph,
    PoseGraphEdges,
    joined,
    pose_graph_steps,
    relative_edges,
)
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.mapping.association import fuse_loop
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import match_mutual
from feedforward_recon.mapping.skeleton import Correction, apply_correction, refine_skeleton
from feedforward_recon.mapping.tracking import CONFIRMED

log = logging.getLogger(__name__)
# Shared landmarks above which no loop is searched: bundle adjustment holds such keyframes together
# already. Twice COVISIBLE; chosen by hand.
WELL_CONNECTED = 60
# Shared landmarks that make an edge of the pose graph, as in ORB-SLAM (Mur-Artal 2015).
COVISIBLE = 30
LOOP_WEIGHT = 3.0  # of a loop against odometry edges: it was verified by PnP; chosen by hand
# The next two: docs/experiments.md, A loop closed in pieces.
RECENT = 8  # keyframes just before one, which share its view; as loops.min_age
# Edges of a keyframe to recent and to older ones: 70 ms where all covisible pairs took 1.2 s.
STRONGEST = 3
ROWS = 100  # keyframes whose covisibility is counted in one piece; chosen by hand
# Landmarks of a loop beside points that only a sensor knows: fewer say nothing of what stays.
# Right loops had 15 and more (docs/experiments.md, Hard walks).
MIN_LANDMARKS = 10
PNP_ITERATIONS = 200  # few are enough: most matches of a true loop agree; chosen by hand


@dataclass(frozen=True)
class Loop:
    """Keyframe ``id`` saw again what keyframe ``old`` saw.

    T_map_cam: pose of ``id`` in the map around ``old``; scale: map units around ``id`` per map
    unit around ``old``; features of ``id`` and the landmarks of ``old`` that they show;
    shift_px: how far the map around ``id`` is off, in its image; inliers: matches that agree.
    """

    id: int
    old: int
    T_map_cam: np.ndarray
    scale: float
    features: np.ndarray
    landmarks: np.ndarray
    shift_px: float
    inliers: int


def find_loop(map_: GrowingMap, config: MapperConfig, id_: int) -> Loop | None:
    """The first verified loop of keyframe ``id_`` to an old one with few common landmarks."""
    for old in _candidates(map_, id_, config):
        loop = _verified(map_, id_, old, config)
        if loop is not None:
            return loop
    return None


def _candidates(map_: GrowingMap, id_: int, config: MapperConfig) -> list[int]:
    count = id_ - config.loops.min_age
    if count <= 0:
        return []
    own = map_.keyframes[id_].features.global_descriptor
    score = np.array([k.features.global_descriptor @ own for k in map_.keyframes[:count]])
    shared = map_.landmarks.shared(map_.landmarks.seen_by(id_), len(map_))[:count]
    order = [int(k) for k in np.argsort(-score, kind='stable') if shared[k] < WELL_CONNECTED]
    return order[:config.loops.candidates]


def _verified(map_: GrowingMap, id_: int, old: int, config: MapperConfig) -> Loop | None:
    keyframe, past = map_.keyframes[id_], map_.keyframes[old]
    a, b = match_mutual(keyframe.descriptors, past.descriptors,
                        config.tracking.match_similarity)
    points = map_.points_cam(old)[b]
    known = np.isfinite(points[:, 2])
    a, b = a[known], b[known]
    points = transform_points(map_.T_map_cam[old], points[known])
    fit = pnp_ransac(points, keyframe.features.keypoints[a], keyframe.camera,
                     config.tracking.outlier_px, config.tracking.seed, PNP_ITERATIONS)
    if fit is None or fit.count < config.loops.min_inliers:
        return None
    loop = _described(map_, id_, old, fit, points, a, b)
    return loop if _rests_on_what_stays(map_, loop) else None


def _rests_on_what_stays(map_: GrowingMap, loop: Loop) -> bool:
    """Whether most landmarks of a loop were confirmed: what moves on is seen by one keyframe.

    Without it, boxes that moved closed loops by hundreds of matches: docs/experiments.md, Hard
    walks.
    """
    views = map_.landmarks.views()[loop.landmarks]
    return len(views) >= MIN_LANDMARKS and bool(np.median(views) >= CONFIRMED)


def _described(map_: GrowingMap, id_: int, old: int, fit: PoseFit, points: np.ndarray,
               a: np.ndarray, b: np.ndarray) -> Loop:
    camera = map_.keyframes[id_].camera
    inside, now = fit.inliers, map_.T_map_cam[id_]
    there = transform_points(inverse(fit.T_map_cam), points)  # in the camera, by the old map
    here = map_.points_cam(id_)[a]  # in the camera, by the new map
    both = inside & np.isfinite(here[:, 2])
    scale = float(np.median(here[both, 2] / there[both, 2])) if both.sum() >= 10 else 1.0
    shift = camera.project(transform_points(inverse(now), points)) - camera.project(there)
    shift_px = np.nan_to_num(np.linalg.norm(shift[inside], axis=1), nan=1e3)
    landmarks = map_.keyframes[old].landmark[b]
    usable = inside & (landmarks >= 0)
    return Loop(id_, old, fit.T_map_cam, scale, a[usable], map_.landmarks.alias[landmarks[usable]],
                float(np.median(shift_px)), fit.count)


def optimise_pose_graph(map_: GrowingMap, loop: Loop, *, with_scale: bool
                        ) -> Iterator[Correction | None]:
    """Optimise the poses of all keyframes, in pieces: None, .., the correction.

    The map is only read, and may grow between the pieces.
    """
    count = len(map_)
    before = PoseGraph(map_.T_map_cam.copy(), np.ones(count))
    loop_edge, rows = _loop_edge(map_, loop, with_scale), []
    for first in range(0, count, ROWS):
        rows.append(_covisibility_edges(map_, np.arange(first, min(first + ROWS, count)), count))
        yield None
    i, j, shared = np.concatenate(rows, axis=1)
    edges = replace(relative_edges(before, i, j), weight=_weight(shared))
    after = before
    for better in pose_graph_steps(before, joined(edges, loop_edge), np.arange(count) == 0,
                                   with_scale=with_scale):
        after = better
        yield None
    yield Correction(before.T_map_cam, after)


def close_loop(map_: GrowingMap, config: MapperConfig, loop: Loop, *, with_scale: bool,
               corrected: Callable[[np.ndarray], None]) -> Iterator[None]:
    """Close a loop in pieces of bounded cost, between which the map may grow.

    First the pose graph, then a skeleton of the map and all landmarks (``refine_skeleton``).
    corrected: called with the scale of each keyframe [K] whenever keyframes have moved.
    """
    for correction in optimise_pose_graph(map_, loop, with_scale=with_scale):
        if correction is None:
            yield
    assert correction is not None
    corrected(apply_correction(map_, correction))
    log.info('loop %d -> %d closed: the map was off by %.1f px, scale %.3f', loop.id, loop.old,
             loop.shift_px, loop.scale)
    fuse_loop(map_, loop.id, loop.features, loop.landmarks)
    yield
    yield from refine_skeleton(map_, config, corrected)


def _loop_edge(map_: GrowingMap, loop: Loop, with_scale: bool) -> PoseGraphEdges:
    T_old_id = inverse(map_.T_map_cam[loop.old]) @ loop.T_map_cam
    # x_map = T (s x): the new map's lengths must shrink by `scale` to agree with the old.
    log_scale = -np.log(loop.scale) if with_scale else 0.0
    return PoseGraphEdges(np.array([loop.old]), np.array([loop.id]), T_old_id[None],
                          np.array([log_scale]), LOOP_WEIGHT * _weight(np.array([loop.inliers])),
                          np.array([False]))


def _weight(shared: np.ndarray) -> np.ndarray:
    """Weights [n] of relative poses that rest on so many shared points: 1 / their error."""
    return np.sqrt(np.maximum(shared, 1) / COVISIBLE)


def _covisibility_edges(map_: GrowingMap, ids: np.ndarray, count: int) -> np.ndarray:
    """Rows i, j, shared landmarks [3, E]: edges of keyframes j of ``ids`` to i < j.

    Of each keyframe only the strongest edges to those just before it and to old ones: more of
    them add little and cost much.
    """
    edges = []
    for j, shared in zip(ids, map_.landmarks.shared_by(ids, count), strict=True):
        for first, last in ((max(0, j - RECENT), j), (0, max(0, j - RECENT))):
            order = first + np.argsort(-shared[first:last], kind='stable')[:STRONGEST]
            edges += [(i, j, shared[i]) for i in order if shared[i] >= COVISIBLE and i != j - 1]
        if j:
            edges.append((j - 1, j, shared[j - 1]))
    return np.array(edges, int).reshape(-1, 3).T
