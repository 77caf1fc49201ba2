"""Data association: landmarks triangulated, seen again in other keyframes, and merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from feedforward_recon.geometry.triangulate import ray_errors, triangulate
from feedforward_recon.mapping.keyframes import MapKeyframe, View
from feedforward_recon.mapping.map import (
    GUIDED_RADIUS_PX,
    SAME_DEPTH,
    SAME_POINT_PX,
    GrowingMap,
    is_hidden,
)
from feedforward_recon.mapping.matching import Tracks, match_guided, match_mutual

# Baseline, as a share of the typical depth, for matches to be triangulated: 2.3 degrees between
# the rays, four times keyframes.min_parallax_deg; chosen by hand.
MIN_BASELINE = 0.04
# Most covisible keyframes whose features are matched with new ones: each costs a product of all
# descriptors, and gives landmarks of two views only; chosen by hand.
MATCHED_KEYFRAMES = 2


def triangulate_pending(map_: GrowingMap, keyframe: int) -> int:
    """Triangulate landmarks of a keyframe whose parallax now suffices; returns their number."""
    table = map_.landmarks
    pending = table.seen_by(keyframe)
    pending = pending[table.alive[pending] & np.isnan(table.point_cam[pending, 2])]
    rows = np.flatnonzero(table.mask(pending)[table.seen_landmark])
    ids, index = np.unique(table.seen_landmark[rows], return_inverse=True)
    if not len(ids):
        return 0
    T, xy = map_.T_map_cam[table.seen_keyframe[rows]], table.seen_xy[rows]
    points, angle_deg = triangulate(T, xy, index, len(ids))
    error = ray_errors(T, xy, np.nan_to_num(points)[index])
    worst = np.zeros(len(ids))
    np.maximum.at(worst, index, error)
    focal_px = map_.keyframes[keyframe].camera.fx
    good = (angle_deg > map_.config.keyframes.min_parallax_deg) & (
        worst * focal_px < map_.config.tracking.outlier_px)
    table.set_points_map(ids[good], points[good], map_.T_map_cam)
    return int(good.sum())


def triangulate_matches(map_: GrowingMap, id_: int) -> int:
    """New landmarks from features that match those of other keyframes by descriptor.

    Only features whose depth is unknown. Not in a keyframe with sparse sensor depth: there many
    young landmarks of two views distorted the map (docs/experiments.md). Returns their number.
    """
    table, found = map_.landmarks, 0
    if map_.keyframes[id_].has_sparse_depth:
        return 0
    shared = table.shared(table.seen_by(id_), len(map_))[:id_]
    baseline = np.linalg.norm(map_.T_map_cam[:id_, :3, 3] - map_.T_map_cam[id_, :3, 3], axis=1)
    apart = baseline > MIN_BASELINE * map_.typical_depth(id_)
    for other in np.argsort(-shared * apart, kind='stable')[:MATCHED_KEYFRAMES]:
        if apart[other] and shared[other] > 0:
            found += _match_pair(map_, map_.keyframes[id_], map_.keyframes[other])
    return found


def _match_pair(map_: GrowingMap, new: MapKeyframe, old: MapKeyframe) -> int:
    free = [np.flatnonzero((k.landmark < 0) & np.isnan(k.points_cam[:, 2]))
            for k in (new, old)]
    a, b = match_mutual(new.descriptors[free[0]],
                        old.descriptors[free[1]],
                        map_.config.tracking.match_similarity)
    a, b = free[0][a], free[1][b]
    px = [new.features.keypoints[a], old.features.keypoints[b]]
    T = map_.T_map_cam[np.repeat([new.id, old.id], len(a))]
    xy = np.concatenate([new.camera.normalise(px[0]), old.camera.normalise(px[1])])
    points, angle_deg = triangulate(T, xy, np.tile(np.arange(len(a)), 2), len(a))
    error = ray_errors(T, xy, np.tile(np.nan_to_num(points), (2, 1))).reshape(2, -1).max(0)
    good = (angle_deg > map_.config.keyframes.min_parallax_deg) & (
        error * new.camera.fx < SAME_POINT_PX)
    a, b, count = a[good], b[good], int(good.sum())
    ids = map_.landmarks.add(old.id, np.full((count, 3), np.nan),
                             old.descriptors[b], old.rgb[b])
    map_.landmarks.set_points_map(ids, points[good], map_.T_map_cam)
    unknown = np.full(count, np.nan)
    for keyframe, rows, seen, half in ((new, a, px[0], 0), (old, b, px[1], 1)):
        keyframe.landmark[rows] = ids
        map_.landmarks.observe(ids, keyframe.id, seen[good],
                               xy.reshape(2, -1, 2)[half][good], unknown, 1.0)
    return count


def reassociate(map_: GrowingMap, id_: int, view: View, tracks: Tracks) -> Tracks:
    """Find landmarks of neighbouring keyframes again in keyframe ``id_`` by guided matching.

    Adds observations, merges landmarks that turn out to be one, and returns the tracks
    under their new ids with the re-found landmarks.
    """
    keyframe = map_.keyframes[id_]
    ids, px, depth = _expected(map_, keyframe)
    seen = ~is_hidden(view.depth_at(px), depth)
    ids, px = _find_again(map_, keyframe, ids[seen], px[seen], depth[seen])
    named = map_.landmarks.alias[np.concatenate([tracks.ids, ids])]
    px = np.concatenate([tracks.px, px])
    first = np.unique(named, return_index=True)[1]
    return Tracks(tracks.gray, named[first], px[first])


def associate_again(map_: GrowingMap) -> Iterator[None]:
    """Find the landmarks of every keyframe in all keyframes around it, one after the other.

    A new keyframe looks only for what is older; here each landmark gets its observations in the
    keyframes before it, and those that are one become one (docs/experiments.md, The finished map).
    The map may grow between the keyframes.
    """
    for keyframe in tuple(map_.keyframes):
        _find_again(map_, keyframe, *_expected(map_, keyframe))
        yield


def _expected(map_: GrowingMap, keyframe: MapKeyframe
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Landmarks that a keyframe should show and has not: ids, pixels [n, 2], z-depths [n]."""
    T = map_.T_map_cam[keyframe.id]
    near = map_.neighbours(T, map_.typical_depth(keyframe.id))
    ids, px, depth = map_.visible(near[near != keyframe.id], T, keyframe.camera)
    unseen = ~map_.landmarks.mask(map_.landmarks.seen_by(keyframe.id))[ids]
    return ids[unseen], px[unseen], depth[unseen]


def _find_again(map_: GrowingMap, keyframe: MapKeyframe, ids: np.ndarray, px: np.ndarray,
                depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match landmarks [n] expected at pixels [n, 2] and z-depths [n] with a keyframe's features.

    Adds observations and merges. Returns ids and pixels of those that it sees now.
    """
    table, tracking = map_.landmarks, map_.config.tracking
    features = replace(keyframe.features, descriptors=keyframe.descriptors)
    row, feature = match_guided(px, table.descriptor[ids], features, GUIDED_RADIUS_PX,
                                tracking.match_similarity)
    seen = ~is_hidden(keyframe.points_cam[feature, 2], depth[row])
    row, feature = row[seen], feature[seen]
    ids, depth, present = ids[row], depth[row], keyframe.landmark[feature]
    free = present < 0
    added, px = feature[free], features.keypoints[feature[free]]
    table.observe(ids[free], keyframe.id, px, keyframe.camera.normalise(px),
                  1 / keyframe.points_cam[added, 2], 1.0)
    keyframe.landmark[added] = ids[free]
    _merge(map_, keyframe, ids[~free], present[~free], depth[~free])
    return ids[free], px


def _merge(map_: GrowingMap, keyframe: MapKeyframe, ids: np.ndarray, present: np.ndarray,
           depth: np.ndarray) -> None:
    """Merge landmarks ``ids`` with those ``present`` in their features where depth agrees."""
    table = map_.landmarks
    present = table.alias[present]
    known = np.isfinite(table.point_cam[present, 2])
    z = map_.depths(keyframe.id, present)
    same = ~known | (np.abs(z - depth) < SAME_DEPTH * depth)
    _join(map_, ids[same], present[same])


def _join(map_: GrowingMap, ids: np.ndarray, others: np.ndarray) -> None:
    """Merge pairs of landmarks; the older one stays unless only the other has a point."""
    table = map_.landmarks
    usable = table.alive[ids] & table.alive[others] & (ids != others)
    pairs = np.sort(np.stack([ids[usable], others[usable]], 1), 1)
    # A pending landmark has no position to keep.
    swap = np.isnan(table.point_cam[pairs[:, 0], 2])
    pairs[swap] = pairs[swap][:, ::-1]
    # Each landmark takes part in one merge at a time: no chains.
    _, first = np.unique(pairs[:, 0], return_index=True)
    pairs = pairs[first]
    _, first = np.unique(pairs[:, 1], return_index=True)
    pairs = pairs[first]
    pairs = pairs[~np.isin(pairs[:, 1], pairs[:, 0])]
    table.merge(pairs[:, 0], pairs[:, 1])


def fuse_loop(map_: GrowingMap, id_: int, features: np.ndarray,
              landmarks: np.ndarray) -> None:
    """Loop fusion: features [n] of a keyframe observe old landmarks [n] of a verified loop.

    Landmarks that the features showed before are merged with them.
    """
    keyframe, table = map_.keyframes[id_], map_.landmarks
    landmarks = table.alias[landmarks]
    present = keyframe.landmark[features]
    free = (present < 0) & ~table.mask(table.seen_by(id_))[landmarks] & table.alive[landmarks]
    px = keyframe.features.keypoints[features[free]]
    table.observe(landmarks[free], id_, px, keyframe.camera.normalise(px),
                  1 / keyframe.points_cam[features[free], 2], 1.0)
    keyframe.landmark[features[free]] = landmarks[free]
    _join(map_, landmarks[present >= 0], table.alias[present[present >= 0]])
