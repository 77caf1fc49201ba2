"""What two images say together: matches that agree with one motion, and points from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from feedforward_recon.geometry.epipolar import PairMotion, checked, motion_between, moved_along
from feedforward_recon.geometry.transforms import inverse, make_transform, transform_points
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.half_rows import half_rows
from feedforward_recon.reconstruction.shots import ROLLS, Shot, seen_rolled
from feedforward_recon.types import Features

# Margin: docs/experiments.md, Photos; the others are chosen by hand.
MIN_SIMILARITY = 0.7  # cosine of two descriptors that may match
THRESHOLD_PX = 2.0  # of an inlier
MARGIN = 0.05  # by which a distinct match is more similar than the next best
MIN_INLIERS = 30  # matches that agree with a pair
MIN_DISTINCT, MIN_SHARE = 20, 0.25  # of them distinct ones, and of all distinct ones
KEYS = 256  # descriptors of an image are multiplied in multiples of so many
PIXEL_NOISE = 0.7  # standard deviation of a corner, px


@dataclass(frozen=True)
class PairGeometry:
    """Two images i, j that show the same.

    feature_i, feature_j: index [M] of the features that match and agree with the motion.
    T_i_j: pose [4, 4] of j in the frame of i, in a unit of the pair's own; no translation for a
    turn on the spot. points: [M, 3] in the frame of i and in that unit, NaN for a turn.
    confidence: [M], one over the expected relative error of a depth. has_depth: the points are
    from depth that a network says, not from the rays of both images.
    """

    i: int
    j: int
    feature_i: np.ndarray
    feature_j: np.ndarray
    T_i_j: np.ndarray
    points: np.ndarray
    confidence: np.ndarray
    has_depth: bool = False

    def __len__(self) -> int:
        return len(self.feature_i)

    @property
    def is_turn(self) -> bool:
        """Whether both images are from one place."""
        return not self.T_i_j[:3, 3].any()

    def seen_from(self, image: int) -> PairGeometry:
        """The pair in the frame of one of its images, which becomes i."""
        if image == self.i:
            return self
        T = inverse(self.T_i_j)
        return PairGeometry(self.j, self.i, self.feature_j, self.feature_i, T,
                            transform_points(T, self.points), self.confidence, self.has_depth)


@dataclass(frozen=True)
class FeatureMatches:
    """Features of two images that may show the same: index [M] each.

    distinct: bool [M], whether no other feature of j is nearly as similar.
    """

    feature_i: np.ndarray
    feature_j: np.ndarray
    distinct: np.ndarray

    def __len__(self) -> int:
        return len(self.feature_i)

    @property
    def swapped(self) -> FeatureMatches:
        """The same, with i and j exchanged."""
        return FeatureMatches(self.feature_j, self.feature_i, self.distinct)


Edge = tuple[int, int]  # images i < j
Pairs = Mapping[Edge, PairGeometry]


class PairDecoder(Protocol):
    """What turns two images into geometry. batch: pairs that it decodes together at most."""

    batch: int

    def rolled(self, image: int) -> np.ndarray:
        """Global descriptors [ROLLS, G] of an image as it is, and with the camera rolled."""

    def match(self, i: int, j: int, roll: int = 0) -> FeatureMatches:
        """Features of images i and j that may show the same, i rolled (``shots.seen_rolled``)."""

    def decode(self, edges: Sequence[Edge], matches: Sequence[FeatureMatches]
               ) -> list[PairGeometry | None]:
        """The motion that the matches of each pair agree with.

        None where the images do not show the same.
        """


@dataclass(frozen=True)
class Comparison:
    """Two images i < j that are to be compared, one perhaps rolled (``shots.seen_rolled``)."""

    i: int
    j: int
    roll_i: int = 0
    roll_j: int = 0


Compared = tuple[FeatureMatches, PairGeometry | None]


def compare(decoder: PairDecoder, batch: Sequence[Comparison]) -> list[Compared]:
    """What pairs of images say, by a decoder."""
    matches = [_matched(decoder, one) for one in batch]
    pairs = decoder.decode([(one.i, one.j) for one in batch], matches)
    return list(zip(matches, pairs, strict=True))


def _matched(decoder: PairDecoder, one: Comparison) -> FeatureMatches:
    if one.roll_j:
        return decoder.match(one.j, one.i, one.roll_j).swapped
    return decoder.match(one.i, one.j, one.roll_i)


class CompactPairs:
    """Pairs from matched descriptors and the essential matrix."""

    batch = 1

    def __init__(self, shots: Sequence[Shot], encoder: CompactEncoder, seed: int = 0) -> None:
        self._shots, self._encoder, self._seed = shots, encoder, seed
        self._rolled: dict[tuple[int, int], torch.Tensor] = {}  # keys of what was matched

    def rolled(self, image: int) -> np.ndarray:
        """Global descriptors [ROLLS, G] of an image as it is, and with the camera rolled."""
        return np.stack([self._features(image, roll).global_descriptor for roll in range(ROLLS)])

    def match(self, i: int, j: int, roll: int = 0) -> FeatureMatches:
        """Features of images i and j that are the most similar of each other."""
        if roll and (i, roll) not in self._rolled:
            self._rolled[i, roll] = _keys(self._features(i, roll))
        keys = self._rolled[i, roll] if roll else _keys(self._features(i, 0))
        return mutual(keys, _keys(self._features(j, 0)))

    def _features(self, image: int, roll: int) -> Features:
        shot = self._shots[image]
        return seen_rolled(shot, self._encoder, roll) if roll else shot.features

    def decode(self, edges: Sequence[Edge], matches: Sequence[FeatureMatches]
               ) -> list[PairGeometry | None]:
        """The motions of pairs, one after the other (see ``PairDecoder``)."""
        return [self._decoded(i, j, found) for (i, j), found in zip(edges, matches, strict=True)]

    def _decoded(self, i: int, j: int, matches: FeatureMatches) -> PairGeometry | None:
        a, b = self._shots[i], self._shots[j]
        chosen = matches.distinct
        if chosen.sum() < MIN_DISTINCT:
            return None
        xy_a, xy_b, tolerance = a.xy[matches.feature_i], b.xy[matches.feature_j], _tolerance(a, b)
        motion = motion_between(xy_a[chosen], xy_b[chosen], tolerance, self._seed)
        if motion is None or motion.inliers.sum() < max(MIN_DISTINCT, MIN_SHARE * chosen.sum()):
            return None
        return with_motion((i, j), matches, self._shots, motion.T_a_b)


def _keys(features: Features) -> torch.Tensor:
    return half_rows(features.descriptors, KEYS)  # zeros match nothing


def mutual(a: torch.Tensor, b: torch.Tensor) -> FeatureMatches:
    """Rows of a [N, D], b [M, D] that are the most similar of each other: unit vectors, or 0."""
    if not len(a) or not len(b):
        return FeatureMatches(np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))
    cosines, row = a @ b.T, torch.arange(len(a))
    best, to_b = cosines.max(1)
    to_a = cosines.max(0).indices
    good = torch.nonzero((to_a[to_b] == row) & (best > MIN_SIMILARITY))[:, 0]
    others = cosines[good]
    others[torch.arange(len(good)), to_b[good]] = -1
    distinct = best[good] - others.amax(1) > MARGIN
    return FeatureMatches(good.numpy(), to_b[good].numpy(), distinct.numpy())


def with_rotation(pair: PairGeometry, shots: Sequence[Shot], R_i_j: np.ndarray
                  ) -> PairGeometry | None:
    """The pair with a rotation [3, 3] that is known better; None where few matches agree.

    With little parallax a pair alone hardly tells a turn from a step.
    """
    a, b = shots[pair.i], shots[pair.j]
    if pair.is_turn:
        T = pair.T_i_j.copy()
        T[:3, :3] = R_i_j
        return replace(pair, T_i_j=T)
    motion = moved_along(R_i_j, pair.T_i_j[:3, 3], a.xy[pair.feature_i], b.xy[pair.feature_j],
                         _tolerance(a, b))
    good = motion.inliers
    if good.sum() < MIN_INLIERS:
        return None
    if pair.has_depth:
        T = make_transform(R_i_j, motion.T_a_b[:3, 3] * np.linalg.norm(pair.T_i_j[:3, 3]))
        return replace(pair, feature_i=pair.feature_i[good], feature_j=pair.feature_j[good],
                       T_i_j=T, points=pair.points[good], confidence=pair.confidence[good])
    return _pair(pair.i, pair.j, pair.feature_i, pair.feature_j, motion, _tolerance(a, b))


def with_motion(edge: Edge, matches: FeatureMatches, shots: Sequence[Shot],
                T_i_j: np.ndarray) -> PairGeometry | None:
    """The matches of images i, j that agree with a motion [4, 4]; None where few do."""
    (i, j), row, column = edge, matches.feature_i, matches.feature_j
    a, b = shots[i], shots[j]
    # Of images from nearly one place, the sign of a depth is noise.
    turn = make_transform(T_i_j[:3, :3], np.zeros(3))
    motion = max((checked(T, a.xy[row], b.xy[column], _tolerance(a, b)) for T in (T_i_j, turn)),
                 key=lambda motion: int(motion.inliers.sum()))
    if motion.inliers.sum() < MIN_INLIERS:
        return None
    return _pair(i, j, row, column, motion, _tolerance(a, b))


def _pair(i: int, j: int, row: np.ndarray, column: np.ndarray, motion: PairMotion, tolerance: float
          ) -> PairGeometry:
    good = motion.inliers
    noise = PIXEL_NOISE * tolerance / THRESHOLD_PX
    return PairGeometry(i, j, row[good], column[good], motion.T_a_b, motion.points[good],
                        motion.angle[good] / noise)


def _tolerance(a: Shot, b: Shot) -> float:
    return THRESHOLD_PX * 2 / (a.camera.fx + b.camera.fx)
