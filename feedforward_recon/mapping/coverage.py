"""Views that old landmarks cover: they need no further keyframe.

So the map of a robot that goes round in one flat stays bounded. A covered frame only renews the
tracks.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import (
    GUIDED_RADIUS_PX,
    SAME_POINT_PX,
    GrowingMap,
    is_hidden,
)
from feedforward_recon.mapping.matching import Tracks, match_guided
from feedforward_recon.types import Features

# What they lead to together: docs/experiments.md, What a keyframe holds, and places seen before.
# Keyframes since a landmark was new; younger ones belong to the present pass; chosen by hand.
AGE = 20
FIRM_VIEWS = 3  # keyframes that saw a landmark: two give the point, the third confirms it
# Share of the tracks on old landmarks below which nothing is searched for: the frame shows new
# things anyway; chosen by hand.
OLD_SHARE = 0.5
# Share of the cells with texture that show an old landmark. Not all: some corners are never
# matched; chosen by hand.
COVERED_SHARE = 0.75
CELLS = 10  # per image width: 64 px of 640, where a well textured image has several corners


def old_and_firm(map_: GrowingMap, ids: np.ndarray) -> np.ndarray:
    """Mask [n] of landmarks that were new long ago and that several keyframes saw."""
    table = map_.landmarks
    return (table.has_point[ids] & (table.anchor[ids] < len(map_) - AGE)
            & (table.views()[ids] >= FIRM_VIEWS))


def covering_tracks(view: View, features: Features, map_: GrowingMap, T_map_cam: np.ndarray,
                    tracks: Tracks) -> Tracks | None:
    """The tracks with all landmarks that can be matched again; None if the view is not covered.

    tracks: of this frame, whose pose is T_map_cam [4, 4].
    """
    if old_and_firm(map_, tracks.ids).sum() < OLD_SHARE * len(tracks.ids):
        return None
    tracks = _found_again(view, features, map_, T_map_cam, tracks)
    size = view.camera.width / CELLS
    textured = np.unique((features.keypoints // size).astype(int), axis=0)
    known = (tracks.px[old_and_firm(map_, tracks.ids)] // size).astype(int)
    covered = (textured[:, None] == known[None]).all(2).any(1)
    return tracks if covered.mean() >= COVERED_SHARE else None


def _found_again(view: View, features: Features, map_: GrowingMap, T_map_cam: np.ndarray,
                 tracks: Tracks) -> Tracks:
    """Tracks, and landmarks of nearby keyframes matched where they project to."""
    near = map_.neighbours(T_map_cam, map_.typical_depth(len(map_) - 1))
    ids, px, depth = map_.visible(near, T_map_cam, view.camera)
    keep = ~np.isin(ids, tracks.ids) & ~is_hidden(view.depth_at(px), depth)
    ids, px = ids[keep], px[keep]
    row, feature = match_guided(px, map_.landmarks.descriptor[ids], features, GUIDED_RADIUS_PX,
                                map_.config.tracking.match_similarity)
    found = features.keypoints[feature]
    alone = cKDTree(tracks.px).query(found)[0] > SAME_POINT_PX if len(tracks.px) \
        else np.ones(len(found), bool)
    return Tracks(tracks.gray, np.concatenate([tracks.ids, ids[row[alone]]]),
                  np.concatenate([tracks.px, found[alone]]))
