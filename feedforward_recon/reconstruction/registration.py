"""Images that pairs alone could not place: found by the points that others made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from feedforward_recon.geometry.pnp import pnp_ransac
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.reconstruction.pairs import Edge, FeatureMatches, PairGeometry, with_motion
from feedforward_recon.reconstruction.refinement import Structure
from feedforward_recon.reconstruction.shots import Shot

MatchesOf = Mapping[Edge, FeatureMatches]

MIN_INLIERS, MIN_SHARE = 30, 0.15  # points that agree with a pose, and of those that were matched
THRESHOLD_PX = 4.0


def placed_by_points(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
                     matches: MatchesOf, seed: int) -> dict[int, np.ndarray]:
    """Poses T_map_cam [4, 4] of images that see enough points of registered ones.

    A plane seen twice allows two motions, but a camera that sees its points has one pose.
    """
    points_of = _points_of(structure, shots)
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (i, j), both in matches.items():
        of_i, of_j = both.feature_i[both.distinct], both.feature_j[both.distinct]
        for image, other, feature, of_other in ((i, j, of_i, of_j), (j, i, of_j, of_i)):
            if registered[other] and not registered[image]:
                point = points_of[other][of_other]
                seen.setdefault(image, []).append((feature[point >= 0], point[point >= 0]))
    found = {}
    for image, parts in seen.items():
        feature, point = (np.concatenate(column) for column in zip(*parts, strict=True))
        _, once = np.unique(feature * len(structure.points) + point, return_index=True)
        feature, point = feature[once], point[once]
        fit = pnp_ransac(structure.points[point], shots[image].features.keypoints[feature],
                         structure.cameras[image], THRESHOLD_PX, seed)
        if fit is not None and fit.count >= max(MIN_INLIERS, MIN_SHARE * len(point)):
            found[image] = fit.T_map_cam
    return found


def agreeing_with(T_map_cam: np.ndarray, shots: Sequence[Shot], registered: np.ndarray,
                  matches: MatchesOf) -> dict[Edge, PairGeometry]:
    """Pairs of registered images, with the matches that agree with their poses."""
    pairs = {edge: with_motion(edge, both, shots, inverse(T_map_cam[edge[0]]) @ T_map_cam[edge[1]])
             for edge, both in matches.items() if registered[list(edge)].all()}
    return {edge: pair for edge, pair in pairs.items() if pair is not None}


def _points_of(structure: Structure, shots: Sequence[Shot]) -> list[np.ndarray]:
    """Per image the point [F] that each feature shows, -1 where none is known."""
    points_of = [np.full(len(shot.features), -1) for shot in shots]
    tracks = structure.tracks
    known = np.isfinite(structure.points[:, 0])
    for image, rows in tracks.by_image():
        rows = rows[known[tracks.point[rows]]]
        points_of[image][tracks.feature[rows]] = tracks.point[rows]
    return points_of
