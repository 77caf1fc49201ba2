"""Poses of a window of images, refined by what the images share.

What photos in any order get once they have poses: matches of all pairs that agree with some
motion, tracks, adjustment, patches aligned, adjustment. Motions of pairs only tell which matches
are wrong: the poses start where they are given, as by a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.reconstruction.pairs import CompactPairs, Comparison, compare
from feedforward_recon.reconstruction.refinement import (
    FINE,
    ROUGH,
    Round,
    refined,
    sharpened,
    triangulated,
)
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.tracks import PointTracks, tracks_of

# A network is further off than poses along a tree: ten degrees are a hundred pixels. Chosen by
# hand on two windows of each of three sets.
WIDE = (Round(400, 32.0, 15), Round(200, 16.0, 15), Round(100, 16.0, 10), Round(40, 8.0, 10))


def shared_tracks(shots: Sequence[Shot], encoder: CompactEncoder) -> PointTracks:
    """What encoded images share, by matches of all pairs that agree with some motion."""
    edges = [Comparison(i, j) for i, j in combinations(range(len(shots)), 2)]
    found = compare(CompactPairs(shots, encoder), edges)
    return tracks_of(shots, [pair for _, pair in found if pair is not None])


def refined_poses(shots: Sequence[Shot], tracks: PointTracks, T_world_cam: np.ndarray
                  ) -> np.ndarray:
    """Poses [N, 4, 4] that agree with the tracks of N encoded images; cameras are held.

    T_world_cam: where they start, [N, 4, 4]. An image that shares nothing stays there.
    """
    structure = triangulated(T_world_cam, [shot.camera for shot in shots], tracks)
    structure = refined(structure, (*WIDE, *ROUGH))
    if len(structure.tracks):
        structure = refined(sharpened(structure, [shot.gray for shot in shots]), FINE)
    return structure.T_map_cam
