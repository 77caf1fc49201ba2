"""Images that pairs alone could not place: found by the points that others made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.geometry.pnp import PoseFit, pnp_ransac
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.reconstruction.pairs import Edge, FeatureMatches, PairGeometry, with_motion
from feedforward_recon.reconstruction.refinement import Structure
from feedforward_recon.reconstruction.shots import Shot

MatchesOf = Mapping[Edge, FeatureMatches]

# Features that agree with a pose, and of those that matched points: of images of other scenes at
# most 7 of 160 to 400 do (docs/experiments.md, Photos).
MIN_INLIERS, MIN_SHARE = 20, 0.03
THRESHOLD_PX = 4.0
# An image of another structure says how that lies in this one if so many of its features agree: of
# other scenes 9 did.
MIN_FOUND = 12
WIDE_PX = 12.0  # between structures that were refined on their own
MIN_SHARED = 8  # points of an image that are in two structures and tell their scale
PNP_STEPS = 10_000


@dataclass(frozen=True)
class Placed:
    """An image found by points: its pose T_map_cam [4, 4], and which feature [n] shows which."""

    T_map_cam: np.ndarray
    feature: np.ndarray
    point: np.ndarray


def placed_by_points(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
                     missing: np.ndarray, matches: MatchesOf, seed: int) -> dict[int, Placed]:
    """Missing images [N] that see enough points of registered ones [N].

    A plane seen twice allows two motions, but a camera that sees its points has one pose.
    """
    found = {}
    for image, (feature, point) in _seen(structure, shots, registered, missing,
                                           matches).items():
        fit = pnp_ransac(structure.points[point], shots[image].features.keypoints[feature],
                         structure.cameras[image], THRESHOLD_PX, seed, PNP_STEPS)
        if fit is not None and _are_enough(feature[fit.inliers], feature):
            found[image] = _placed(fit, feature, point)
    return found


def with_placed(structure: Structure, found: Mapping[int, Placed], shots: Sequence[Shot]
                ) -> Structure:
    """The structure with images that were found; its points stay where they are."""
    T_map_cam, tracks, errors = structure.T_map_cam.copy(), structure.tracks, structure.error_px
    for image, placed in found.items():
        T_map_cam[image] = placed.T_map_cam
        px = shots[image].features.keypoints[placed.feature].astype(float)
        tracks = tracks.seen_by(image, placed.feature, placed.point, px)
        seen = structure.cameras[image].project(transform_points(
            inverse(placed.T_map_cam), structure.points[placed.point]))
        errors = np.concatenate([errors, np.linalg.norm(seen - px, axis=1)])
    return replace(structure, T_map_cam=T_map_cam, tracks=tracks, error_px=errors)


def placed_together(structure: Structure, other: Structure, shots: Sequence[Shot],
                    registered: np.ndarray, others: np.ndarray, matches: MatchesOf, seed: int
                    ) -> dict[int, np.ndarray]:
    """Poses T_map_cam [4, 4] of ``others`` [N], images of another structure, in this one.

    Each image that is found in this structure says how the other one lies in it; all images say
    which of these they agree with. None, where too few points do.
    """
    seen = _seen(structure, shots, registered, others, matches)
    own, images, best = _points_of(other, shots), np.flatnonzero(others), 0
    found: dict[int, np.ndarray] = {}
    for image, (feature, point) in seen.items():
        fit = pnp_ransac(structure.points[point], shots[image].features.keypoints[feature],
                         structure.cameras[image], THRESHOLD_PX, seed, PNP_STEPS)
        if fit is None or fit.count < MIN_FOUND or image not in own:
            continue
        scale = _scale(fit.T_map_cam, structure.points[point[fit.inliers]],
                       other.T_map_cam[image], other.points, own[image][feature[fit.inliers]])
        if scale is None:
            continue
        T = inverse(other.T_map_cam[image]) @ other.T_map_cam[images]
        T[:, :3, 3] *= scale
        T_map_cam = dict(zip(images.tolist(), fit.T_map_cam @ T, strict=True))
        agree = sum(_agreeing(structure, shots[k], T_map_cam[k], *seen[k]) for k in seen)
        if agree > best:
            best, found = agree, T_map_cam
    return found


def _placed(fit: PoseFit, feature: np.ndarray, point: np.ndarray) -> Placed:
    """What was found, each feature and each point once."""
    rows = np.flatnonzero(fit.inliers)
    for column in (feature, point):
        rows = rows[np.sort(np.unique(column[rows], return_index=True)[1])]
    return Placed(fit.T_map_cam, feature[rows], point[rows])


def _are_enough(agreeing: np.ndarray, matched: np.ndarray) -> bool:
    """Whether features that agree with a pose vouch for it; each matched several points."""
    share = MIN_SHARE * len(np.unique(matched))
    return len(np.unique(agreeing)) >= max(MIN_INLIERS, share)


def _scale(T_map_cam: np.ndarray, points: np.ndarray, T_other_cam: np.ndarray,
           others: np.ndarray, point: np.ndarray) -> float | None:
    """Units of the map per unit of another, from points [M] of a camera, -1 where not in both."""
    both = point >= 0
    if both.sum() < MIN_SHARED:
        return None
    depth = transform_points(inverse(T_map_cam), points[both])[:, 2]
    depth_other = transform_points(inverse(T_other_cam), others[point[both]])[:, 2]
    front = np.minimum(depth, depth_other) > 0
    return float(np.median(depth[front] / depth_other[front])) if front.any() else None


def _agreeing(structure: Structure, shot: Shot, T_map_cam: np.ndarray, feature: np.ndarray,
              point: np.ndarray) -> int:
    """How many features of an image show the points [n] that they match."""
    seen = transform_points(inverse(T_map_cam), structure.points[point])
    front = seen[:, 2] > 0
    error = np.linalg.norm(seen[front, :2] / seen[front, 2:] - shot.xy[feature[front]], axis=1)
    return len(np.unique(feature[front][shot.camera.fx * error < WIDE_PX]))


def _seen(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
          missing: np.ndarray, matches: MatchesOf) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Per missing image, its features and the points [n] of registered ones that they match."""
    points_of = _points_of(structure, shots)
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (i, j), both in matches.items():
        if not (missing[i] or missing[j]):
            continue
        of_i, of_j = both.feature_i[both.distinct], both.feature_j[both.distinct]
        for image, other, feature, of_other in ((i, j, of_i, of_j), (j, i, of_j, of_i)):
            if missing[image] and other in points_of and registered[other]:
                point = points_of[other][of_other]
                seen.setdefault(image, []).append((feature[point >= 0], point[point >= 0]))
    return {image: _once(parts, len(structure.points)) for image, parts in seen.items()}


def _once(parts: list[tuple[np.ndarray, np.ndarray]], points: int
          ) -> tuple[np.ndarray, np.ndarray]:
    """Features and points of several images together, each pair of them once."""
    feature, point = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, once = np.unique(feature * points + point, return_index=True)
    return feature[once], point[once]


def agreeing_with(T_map_cam: np.ndarray, shots: Sequence[Shot], registered: np.ndarray,
                  matches: MatchesOf) -> dict[Edge, PairGeometry]:
    """Pairs of registered images, with the matches that agree with their poses."""
    pairs = {edge: with_motion(edge, both, shots, inverse(T_map_cam[edge[0]]) @ T_map_cam[edge[1]])
             for edge, both in matches.items() if registered[edge[0]] and registered[edge[1]]}
    return {edge: pair for edge, pair in pairs.items() if pair is not None}


def _points_of(structure: Structure, shots: Sequence[Shot]) -> dict[int, np.ndarray]:
    """Per image with tracks the point [F] that each feature shows, -1 where none is known."""
    points_of = {}
    tracks = structure.tracks
    known = np.isfinite(structure.points[:, 0])
    for image, rows in tracks.by_image():
        rows = rows[known[tracks.point[rows]]]
        points_of[image] = np.full(len(shots[image].features), -1)
        points_of[image][tracks.feature[rows]] = tracks.point[rows]
    return points_of
