"""Two maps of one place become one: how they lie in each other, and all of both in one frame.

Keyframes that look alike are matched by the descriptors of their landmarks, all pairs of them
together give one transform, and the landmarks that agree with it are the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feedforward_recon.errors import DegenerateError, MapError
from feedforward_recon.geometry.align import Alignment, align_points, align_points_robust
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import match_mutual

PAIRS = 60  # of keyframes, the most alike ones, that are matched
SAMPLES = 2000  # of three matches; with 15 % right ones, seven of them are right; chosen by hand
# Matches agree within this share of the depth of a keyframe: a landmark of two near views is good
# to a few per cent of it.
TOLERANCE = 0.03
MIN_INLIERS, MIN_SHARE = 30, 0.1  # landmarks that must agree, and of those that were matched


@dataclass(frozen=True)
class Joint:
    """How map b lies in map a, and landmarks a, b [n] that are the same."""

    alignment: Alignment
    landmarks_a: np.ndarray
    landmarks_b: np.ndarray


def find_joint(a: GrowingMap, b: GrowingMap, *, with_scale: bool) -> Joint:
    """Align map b with map a.

    with_scale: their units may differ. Raises MapError when they do not show the same place.
    """
    ids_a, ids_b = _matched_landmarks(a, b)
    points_a = a.landmarks.points_map(ids_a, a.T_map_cam)
    points_b = b.landmarks.points_map(ids_b, b.T_map_cam)
    tolerance = TOLERANCE * float(np.median([a.typical_depth(k) for k in range(len(a))]))
    inliers = _consensus(points_b, points_a, tolerance, with_scale,
                         a.config.tracking.seed)
    if inliers.sum() < max(MIN_INLIERS, MIN_SHARE * len(ids_a)):
        raise MapError('expected two maps that show the same place, found '
                       f'{int(inliers.sum())} of {len(ids_a)} landmarks that agree; map a walk '
                       'that connects them, or go on with one of them (--into)')
    alignment = align_points_robust(points_b[inliers], points_a[inliers], with_scale=with_scale,
                                    noise=0.1 * tolerance)
    return Joint(alignment, ids_a[inliers], ids_b[inliers])


def add_map(a: GrowingMap, b: GrowingMap, joint: Joint) -> None:
    """Add map b, which is used up, to map a; the landmarks of the joint become one."""
    first, landmarks = len(a), len(a.landmarks)
    b.rescale(joint.alignment.scale)
    b.landmarks.seen_inv_depth /= joint.alignment.scale
    for keyframe in b.keyframes:
        keyframe.id += first
        keyframe.landmark = np.where(keyframe.landmark >= 0, keyframe.landmark + landmarks, -1)
        keyframe.points_cam = keyframe.points_cam * joint.alignment.scale
        keyframe.cloud_cam = keyframe.cloud_cam * keyframe.cloud_cam.dtype.type(
            joint.alignment.scale)
    a.keyframes += b.keyframes
    T_map_cam = joint.alignment.T_target_source @ b.T_map_cam
    a.T_map_cam = np.concatenate([a.T_map_cam, T_map_cam])
    a.landmarks.append(b.landmarks, first)
    a.landmarks.merge(joint.landmarks_a, joint.landmarks_b + landmarks)
    a.depth_spread = max(a.depth_spread, b.depth_spread)


def _matched_landmarks(a: GrowingMap, b: GrowingMap) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks [n] of both that look the same in keyframes that look alike; each once."""
    likeness = np.stack([k.features.global_descriptor for k in a.keyframes]) \
        @ np.stack([k.features.global_descriptor for k in b.keyframes]).T
    best = np.argsort(-likeness, axis=None, kind='stable')[:PAIRS]
    votes: dict[tuple[int, int], int] = {}
    for row, column in zip(*np.unravel_index(best, likeness.shape), strict=True):
        for pair in _matched(a, int(row), b, int(column)):
            votes[pair] = votes.get(pair, 0) + 1
    order = sorted(votes, key=lambda pair: -votes[pair])
    used_a: set[int] = set()
    used_b: set[int] = set()
    chosen = []
    for one, other in order:
        if one not in used_a and other not in used_b:
            chosen.append((one, other))
            used_a.add(one)
            used_b.add(other)
    ids = np.array(chosen, int).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]


def _matched(a: GrowingMap, id_a: int, b: GrowingMap, id_b: int) -> list[tuple[int, int]]:
    """Landmarks that two keyframes show and that look the same."""
    (shown_a, ids_a), (shown_b, ids_b) = _shown(a, id_a), _shown(b, id_b)
    row, column = match_mutual(a.keyframes[id_a].descriptors[shown_a],
                               b.keyframes[id_b].descriptors[shown_b],
                               a.config.tracking.match_similarity)
    return list(zip(ids_a[row].tolist(), ids_b[column].tolist(), strict=True))


def _shown(map_: GrowingMap, id_: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of a keyframe that show a landmark with a point, and these landmarks."""
    keyframe, table = map_.keyframes[id_], map_.landmarks
    shown = np.flatnonzero(keyframe.landmark >= 0)
    ids = table.alias[keyframe.landmark[shown]]
    return shown[table.has_point[ids]], ids[table.has_point[ids]]


def _consensus(source: np.ndarray, target: np.ndarray, tolerance: float, with_scale: bool,
               seed: int) -> np.ndarray:
    """Mask [n] of points that agree with the transform that most of them agree with."""
    best = np.zeros(len(source), bool)
    if len(source) < MIN_INLIERS:
        return best
    rng = np.random.default_rng(seed)
    for _ in range(SAMPLES):
        chosen = rng.choice(len(source), 3, replace=False)
        try:
            fit = align_points(source[chosen], target[chosen], with_scale=with_scale)
        except DegenerateError:
            continue
        near = np.linalg.norm(fit.apply(source) - target, axis=1) < tolerance
        if near.sum() > best.sum():
            best = near
    return best
