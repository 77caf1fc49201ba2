"""What two images say together: matches that agree with one motion, and points from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from feedforward_recon.geometry.epipolar import PairMotion, motion_between, moved_along
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.reconstruction.shots import Shot

# All measured: docs/experiments.md, Pairs of photos.
MIN_SIMILARITY = 0.7  # cosine of two descriptors that may match
THRESHOLD_PX = 2.0  # of an inlier
MIN_INLIERS, MIN_SHARE = 30, 0.25  # of a pair, and of its matches
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


class PairDecoder(Protocol):
    """What turns two images into geometry."""

    def decode(self, i: int, j: int) -> PairGeometry | None:
        """Images i and j; None where they do not show the same."""


class CompactPairs:
    """Pairs from matched descriptors and the essential matrix."""

    def __init__(self, shots: Sequence[Shot], seed: int = 0) -> None:
        self._shots, self._seed = shots, seed
        # Half precision: twice as fast, and only decides between nearly equal neighbours.
        self._keys = [torch.from_numpy(shot.features.descriptors).to(torch.bfloat16)
                      for shot in shots]

    def decode(self, i: int, j: int) -> PairGeometry | None:
        """Images i and j; None where they do not show the same."""
        a, b = self._shots[i], self._shots[j]
        row, column = mutual(self._keys[i], self._keys[j])
        if len(row) < MIN_INLIERS:
            return None
        motion = motion_between(a.xy[row], b.xy[column], _tolerance(a, b), self._seed)
        if motion is None or motion.inliers.sum() < max(MIN_INLIERS, MIN_SHARE * len(row)):
            return None
        return _pair(i, j, row, column, motion, _tolerance(a, b))


def mutual(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unit vectors a [N, D], b [M, D] that are the most similar of each other."""
    if not len(a) or not len(b):
        return np.zeros(0, int), np.zeros(0, int)
    cosines = a @ b.T
    best, to_b = cosines.max(1)
    to_a = cosines.max(0).indices
    good = (to_a[to_b] == torch.arange(len(a))) & (best > MIN_SIMILARITY)
    return torch.nonzero(good)[:, 0].numpy(), to_b[good].numpy()


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


def _pair(i: int, j: int, row: np.ndarray, column: np.ndarray, motion: PairMotion, tolerance: float
          ) -> PairGeometry:
    good = motion.inliers
    noise = PIXEL_NOISE * tolerance / THRESHOLD_PX
    return PairGeometry(i, j, row[good], column[good], motion.T_a_b, motion.points[good],
                        motion.angle[good] / noise)


def _tolerance(a: Shot, b: Shot) -> float:
    return THRESHOLD_PX * 2 / (a.camera.fx + b.camera.fx)
