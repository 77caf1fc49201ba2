"""Finding a lost camera among the keyframes.

Retrieval by global descriptor, descriptor matches and PnP in RANSAC give a first pose; guided
matching of all landmarks that should be in view from there verifies it, which a wrong place does
not pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.geometry.pnp import pnp_ransac
from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks, match_guided, match_mutual
from feedforward_recon.mapping.tracking import CONFIRMED, Tracked, fit_pose, support
from feedforward_recon.types import Features

CANDIDATES = 5  # most similar keyframes that are tried; each costs a PnP; chosen by hand
# Covisible keyframes whose landmarks are matched beside those of a candidate, which alone shows
# only part of the view; chosen by hand.
COMPANIONS = 4
MIN_FIRST_INLIERS = 12  # to be verified: thrice the points of a P3P sample; chosen by hand
# First as wide as PnP on few matches is off, then a little beyond outlier_px.
SEARCH_RADII_PX = (16.0, 6.0)
MIN_SCORE = 0.5  # share of matches around a pose: in a wrong place most of them disagree
# Without depth, how far matches spread over the image (standard deviation of the pixels, of its
# width or height) times their share: in a strip a step to the side and a turn look alike. 754 of
# 829 right poses have more, and 2 of 56 wrong ones (docs/experiments.md, Hard walks).
CLEAR_VIEW = 0.09


def relocalise(view: View, features: Features, map_: GrowingMap,
               config: TrackingConfig) -> Tracked | None:
    """Pose and tracks of a view without a prior pose; None if no place agrees with it."""
    if not len(map_):
        return None
    views = map_.landmarks.views()
    fits = [_against(view, features, map_, id_, views, config)
            for id_ in _similar(features, map_)]
    found = sorted((f for f in fits if f is not None), key=lambda f: (-f.votes, -f.count))
    best = None
    for first in found[:2]:
        tracked = found_place(view, features, map_, first.T_map_cam, config)
        if tracked is not None and tracked.extends:
            return tracked
        best = best or tracked
    return best


def found_place(view: View, features: Features, map_: GrowingMap, T_map_cam: np.ndarray,
                config: TrackingConfig) -> Tracked | None:
    """``verified``, anywhere in the map: not sure, and no keyframe, if little speaks for it."""
    tracked = verified(view, features, map_, T_map_cam, config)
    if tracked is None or view.has_depth:
        return tracked
    spread = (tracked.tracks.px.std(0) / view.camera.size_wh).min()
    if spread * support(tracked.fit) >= CLEAR_VIEW:
        return tracked
    return replace(tracked, sure=False, extends=False)


def _similar(features: Features, map_: GrowingMap) -> list[int]:
    """The newest keyframe and the most similar ones by global descriptor."""
    newest = len(map_) - 1
    score = np.array([k.features.global_descriptor @ features.global_descriptor
                      for k in map_.keyframes])
    order = np.argsort(-score, kind='stable')[:CANDIDATES]
    return [newest, *(int(k) for k in order if k != newest)]


@dataclass(frozen=True)
class _First:
    """A first pose [4, 4], how many matches agree with it, and for how many keyframes they speak.

    votes: as in ``tracking.elected``; something that moves looks familiar, but is new each time.
    """

    T_map_cam: np.ndarray
    count: int
    votes: int


def _against(view: View, features: Features, map_: GrowingMap, id_: int, views: np.ndarray,
             config: TrackingConfig) -> _First | None:
    """PnP against the points of a keyframe and the landmarks of covisible ones."""
    keyframe, table = map_.keyframes[id_], map_.landmarks
    own = map_.points_cam(id_)
    # Not the features of landmarks that were given up: they moved, or never agreed.
    known = np.isfinite(own[:, 2]) & ((keyframe.landmark < 0)
                                      | table.alive[table.alias[keyframe.landmark]])
    seen = table.seen_by(id_)
    shared = table.shared(seen, len(map_))
    shared[id_] = 0
    companions = np.argsort(-shared, kind='stable')[:COMPANIONS]
    near = table.mask(table.seen_landmark[np.isin(table.seen_keyframe, companions)])
    near[seen] = False
    ids = np.flatnonzero(near & table.has_point)
    points = np.concatenate([transform_points(map_.T_map_cam[id_], own[known]),
                             table.points_map(ids, map_.T_map_cam)])
    descriptors = np.concatenate([keyframe.descriptors[known], table.descriptor[ids]])
    a, b = match_mutual(features.descriptors, descriptors, config.match_similarity)
    fit = pnp_ransac(points[b], features.keypoints[a], view.camera, config.outlier_px,
                     config.seed)
    if fit is None or fit.count < MIN_FIRST_INLIERS:
        return None
    shown = np.concatenate([keyframe.landmark[known], ids])[b[fit.inliers]]
    votes = views[table.alias[shown[shown >= 0]]] - 1
    return _First(fit.T_map_cam, fit.count, int(votes.sum()))


def verified(view: View, features: Features, map_: GrowingMap, T_map_cam: np.ndarray,
             config: TrackingConfig) -> Tracked | None:
    """Verify a first pose [4, 4]: match all landmarks in view, first widely, then closely.

    Returns the refined pose with its tracks; None where too few agree.
    """
    for radius_px in SEARCH_RADII_PX:
        near = map_.neighbours(T_map_cam, map_.typical_depth(len(map_) - 1))
        ids, px, _ = map_.visible(near, T_map_cam, view.camera)
        row, feature = match_guided(px, map_.landmarks.descriptor[ids], features, radius_px,
                                    config.match_similarity)
        tracks = Tracks(view.gray, ids[row], features.keypoints[feature])
        rough = pnp_ransac(map_.landmarks.points_map(tracks.ids, map_.T_map_cam), tracks.px,
                           view.camera, config.outlier_px, config.seed)
        if rough is None:
            return None
        T_map_cam = rough.T_map_cam
    fit = fit_pose(view, map_, tracks, T_map_cam, config)
    if fit.count < max(config.relocalise_inliers, MIN_SCORE * len(tracks.ids)):
        return None
    tracks = tracks.select(fit.inliers)
    if len(map_) > CONFIRMED and (map_.landmarks.views()[tracks.ids] >= CONFIRMED
                                  ).sum() < config.min_inliers:
        return None
    return Tracked(tracks, fit, features)
