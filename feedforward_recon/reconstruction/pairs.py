"""What two images say together: matches that agree with one motion, and points from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from feedforward_recon.geometry.epipolar import PairMotion, checked, motion_between, moved_along
from feedforward_recon.geometry.transforms import inverse, make_transform, transform_points
from feedforward_recon.reconstruction.shots import Shot

# Margin: docs/experiments.md, Photos; the others are chosen by hand.
MIN_SIMILARITY = 0.7  # cosine of two descriptors that may match
THRESHOLD_PX = 2.0  # of an inlier
MARGIN = 0.05  # by which a distinct match is more similar than the next best
MIN_INLIERS = 30  # matches that agree with a pair
MIN_DISTINCT, MIN_SHARE = 20, 0.25  # of them distinct ones, and of all distinct ones
PIXEL_NOISE = 0.7  # standard deviation of a corner, px


@dataclass(frozen=True)
class PairGeometry:
    """Two images i, j that show the same.

    feature_i, feature_j: index [M] of the features that match and agree with the motion.
    T_i_j: pose [4, 4] of j in the frame of i, in a unit of the pair's own; no translation for a
    turn on the spot. points: [M, 3] in the frame of i and in that unit, NaN for a turn.
    confidence: [M], one over the expected relative error of a depth.
    """

    i: int
    j: int
    feature_i: np.ndarray
    feature_j: np.ndarray
    T_i_j: np.ndarray
    points: np.ndarray
    confidence: np.ndarray

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
                            transform_points(T, self.points), self.confidence)


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


Edge = tuple[int, int]  # images i < j
Pairs = Mapping[Edge, PairGeometry]


class PairDecoder(Protocol):
    """What turns two images into geometry."""

    def match(self, i: int, j: int) -> FeatureMatches:
        """Features of images i and j that may show the same."""

    def decode(self, i: int, j: int, matches: FeatureMatches) -> PairGeometry | None:
        """The motion that matches agree with; None where the images do not show the same."""


def compare(decoder: PairDecoder, edge: Edge) -> tuple[FeatureMatches, PairGeometry | None]:
    """What a pair of images says, by a decoder."""
    matches = decoder.match(*edge)
    return matches, decoder.decode(*edge, matches)


class CompactPairs:
    """Pairs from matched descriptors and the essential matrix."""

    def __init__(self, shots: Sequence[Shot], seed: int = 0) -> None:
        self._shots, self._seed = shots, seed

    def match(self, i: int, j: int) -> FeatureMatches:
        """Features of images i and j that are the most similar of each other."""
        # Half precision: twice as fast, and only decides between nearly equal neighbours.
        return mutual(*(torch.tensor(self._shots[image].features.descriptors,
                                     dtype=torch.bfloat16) for image in (i, j)))

    def decode(self, i: int, j: int, matches: FeatureMatches) -> PairGeometry | None:
        """The motion that matches agree with; None where the images do not show the same."""
        a, b = self._shots[i], self._shots[j]
        chosen = matches.distinct
        if chosen.sum() < MIN_DISTINCT:
            return None
        xy_a, xy_b, tolerance = a.xy[matches.feature_i], b.xy[matches.feature_j], _tolerance(a, b)
        motion = motion_between(xy_a[chosen], xy_b[chosen], tolerance, self._seed)
        if motion is None or motion.inliers.sum() < max(MIN_DISTINCT, MIN_SHARE * chosen.sum()):
            return None
        return with_motion((i, j), matches, self._shots, motion.T_a_b)


def mutual(a: torch.Tensor, b: torch.Tensor) -> FeatureMatches:
    """Rows of unit vectors a [N, D], b [M, D] that are the most similar of each other."""
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
    if motion.inliers.sum() < MIN_INLIERS:
        return None
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
