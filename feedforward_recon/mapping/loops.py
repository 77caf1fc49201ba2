"""Loop closure: recognise an old place, verify it geometrically, correct poses and points."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit, pnp_ransac
from feedforward_recon.geometry.posegraph import (
    PoseGraph,
    PoseGraphEdges,
    joined,
    optimise_pose_graph,
    relative_edges,
)
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.mapping.growing_map import GrowingMap
from feedforward_recon.mapping.matching import match_mutual

log = logging.getLogger(__name__)
WELL_CONNECTED = 60
COVISIBLE = 30
LOOP_WEIGHT = 3.0
PNP_ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """Keyframe ``id`` saw again what keyframe ``old`` saw.

    T_map_cam: pose of ``id`` in the map around ``old``; scale: map units around ``id`` per map
    unit around ``old``; features of ``id`` and the landmarks of ``old`` that they show;
    shift_px: how far the map around ``id`` is off, in its image.
    """

    id: int
    old: int
    T_map_cam: np.ndarray
    scale: float
    features: np.ndarray
    landmarks: np.ndarray
    shift_px: float


def find_loop(map_: GrowingMap, id_: int, config: MapperConfig) -> Loop | None:
    """The first verified loop of a keyframe to an old one that it is not yet tied to."""
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
    tied = map_.landmarks.shared(map_.landmarks.seen_by(id_), len(map_))[:count]
    order = [int(k) for k in np.argsort(-score, kind='stable') if tied[k] < WELL_CONNECTED]
    return order[:config.loops.candidates]


def _verified(map_: GrowingMap, id_: int, old: int, config: MapperConfig) -> Loop | None:
    keyframe, past = map_.keyframes[id_], map_.keyframes[old]
    a, b = match_mutual(keyframe.features.descriptors, past.features.descriptors,
                        config.tracking.match_similarity)
    points = map_.points_cam(old)[b]
    known = np.isfinite(points[:, 2])
    a, b = a[known], b[known]
    points = transform_points(map_.T_map_cam[old], points[known])
    fit = pnp_ransac(points, keyframe.features.keypoints[a], keyframe.camera,
                     config.tracking.outlier_px, config.tracking.seed, PNP_ITERATIONS)
    if fit is None or fit.count < config.loops.min_inliers:
        return None
    return _described(map_, id_, old, fit, points, a, b)


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
    tie = inside & (landmarks >= 0)
    return Loop(id_, old, fit.T_map_cam, scale, a[tie], map_.landmarks.alias[landmarks[tie]],
                float(np.median(shift_px)))


def correct(map_: GrowingMap, loop: Loop, *, with_scale: bool) -> np.ndarray:
    """Bend the trajectory so that the loop closes; returns the scale of each keyframe [K].

    Landmarks follow their anchors. Landmark positions are consistent afterwards up to what
    bundle adjustment removes.
    """
    count = len(map_)
    graph = PoseGraph(map_.T_map_cam, np.ones(count))
    i, j = _covisible_pairs(map_)
    edges = joined(relative_edges(graph, i, j), _loop_edge(map_, loop, with_scale))
    graph = optimise_pose_graph(graph, edges, np.arange(count) == 0, with_scale=with_scale)
    map_.T_map_cam = graph.T_map_cam
    map_.landmarks.point_cam *= graph.scale[map_.landmarks.anchor][:, None]
    log.info('loop %d -> %d closed: the map was off by %.1f px, scale %.3f', loop.id, loop.old,
             loop.shift_px, loop.scale)
    return graph.scale


def _loop_edge(map_: GrowingMap, loop: Loop, with_scale: bool) -> PoseGraphEdges:
    T_old_id = inverse(map_.T_map_cam[loop.old]) @ loop.T_map_cam
    # x_map = T (s x): the new map's lengths must shrink by `scale` to agree with the old.
    log_scale = -np.log(loop.scale) if with_scale else 0.0
    return PoseGraphEdges(np.array([loop.old]), np.array([loop.id]), T_old_id[None],
                          np.array([log_scale]), np.array([LOOP_WEIGHT]), np.array([False]))


def _covisible_pairs(map_: GrowingMap) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of keyframes that follow each other or share enough landmarks."""
    table, count = map_.landmarks, len(map_)
    pairs = {(k, k + 1) for k in range(count - 1)}
    for j in range(count):
        shared = table.shared(table.seen_by(j), count)
        pairs.update((int(i), j) for i in np.flatnonzero(shared[:j] >= COVISIBLE))
    array = np.array(sorted(pairs)).reshape(-1, 2)
    return array[:, 0], array[:, 1]
