"""Poses from pairs: each pair is brought to what its first image knows already.

Light3R-SfM puts pointmaps together by Procrustes alignment along a tree, weighted by confidence
(``Procrustes``). Of a pair of the compact encoder only the unit is unknown once the first image
has a pose, so its alignment is one number (``DepthRatios``): a weighted median of the ratios of
depths, which wrong points do not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.align import align_points_robust, weighted_median
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.reconstruction.pairs import Edge, PairGeometry, Pairs
from feedforward_recon.reconstruction.shots import Shot

MIN_SHARED = 8  # points of an image that a pair must share with what is known of it
MIN_CONFIDENCE = 3.0  # of a point that says where a pair lies: its depth is good to a third


@dataclass(frozen=True)
class Known:
    """Points [M, 3] of features of one image, NaN where unknown, and their confidence [M]."""

    points: np.ndarray
    confidence: np.ndarray

    def of(self, feature: np.ndarray) -> Known:
        """What is known of features of these numbers."""
        return Known(self.points[feature], self.confidence[feature])

    @property
    def says(self) -> np.ndarray:
        """Bool [M], which points are known and trusted at all."""
        return np.isfinite(self.points).all(1) & (self.confidence > 0)


@dataclass(frozen=True)
class PairPlacement:
    """Where a pair lies: a point of it is at ``T_map_pair (scale * point)``."""

    T_map_pair: np.ndarray
    scale: float = 1.0

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [M, 3] of the pair in the map."""
        return transform_points(self.T_map_pair, self.scale * points)

    def pose(self, T_pair_cam: np.ndarray) -> np.ndarray:
        """The pose [4, 4] in the map of a camera of the pair."""
        T = T_pair_cam.copy()
        T[:3, 3] *= self.scale
        return self.T_map_pair @ T


class PairAlignment(Protocol):
    """How a pair is placed by the points that it shares with the map, and what is kept of both."""

    def placed(self, T_map_i: np.ndarray, pair: Known, known: Known) -> PairPlacement | None:
        """Where the pair lies, by its points and those that are known of the same features.

        T_map_i: the pose of its first image. None where they share too little.
        """

    def better(self, new: Known, known: Known) -> np.ndarray:
        """Bool [M], which of the new points take the place of what was known."""

    def fused(self, new: Known, known: Known) -> np.ndarray:
        """The confidence [M] of what was known, now that a pair says the same."""


class DepthRatios:
    """The first image stays where it is; the unit is the weighted median of ratios of depths."""

    def placed(self, T_map_i: np.ndarray, pair: Known, known: Known) -> PairPlacement | None:
        """Where the pair lies (see ``PairAlignment``)."""
        depth = transform_points(inverse(T_map_i), known.points)[:, 2]
        confidence = np.minimum(pair.confidence, known.confidence)
        with np.errstate(invalid='ignore'):
            shared = (depth > 0) & (pair.points[:, 2] > 0) & (confidence > MIN_CONFIDENCE)
        if shared.sum() < MIN_SHARED:
            return None
        ratio = np.log(depth[shared] / pair.points[shared, 2])
        return PairPlacement(T_map_i, float(np.exp(weighted_median(ratio, confidence[shared]))))

    def better(self, new: Known, known: Known) -> np.ndarray:
        """The surer ones."""
        return (new.confidence > known.confidence) & np.isfinite(new.points[:, 0])

    def fused(self, new: Known, known: Known) -> np.ndarray:
        """As it was."""
        del new
        return known.confidence


@dataclass(frozen=True)
class Procrustes:
    """Light3R-SfM, sec. 3.3: the points of the pair are moved to those that are known.

    Weighted by the logarithm of the confidence, which is the geometric mean of both; this is what
    stays of it, and the first points stay. Unlike the paper's least squares, sure points that are
    wrong do not pull (docs/experiments.md, Photos).
    with_scale: a similarity, of pairs in units of their own; a rigid motion without.
    """

    with_scale: bool

    def placed(self, T_map_i: np.ndarray, pair: Known, known: Known) -> PairPlacement | None:
        """Where the pair lies (see ``PairAlignment``); None also where the points do not tell."""
        del T_map_i
        confidence = self.fused(pair, known)
        shared = pair.says & known.says & (confidence > MIN_CONFIDENCE)
        if shared.sum() < MIN_SHARED:
            return None
        try:
            done = align_points_robust(pair.points[shared], known.points[shared],
                                       np.log(confidence[shared]), with_scale=self.with_scale)
        except DegenerateError:  # all on one line
            return None
        return PairPlacement(done.T_target_source, done.scale)

    def better(self, new: Known, known: Known) -> np.ndarray:
        """Those where nothing was known."""
        return new.says & ~known.says

    def fused(self, new: Known, known: Known) -> np.ndarray:
        """The geometric mean, where both know a point."""
        return np.where(new.says & known.says, np.sqrt(new.confidence * known.confidence),
                        known.confidence)


ALIGNMENTS: dict[str, PairAlignment] = {
    'depth': DepthRatios(), 'similarity': Procrustes(True), 'rigid': Procrustes(False)}


class Accumulation:
    """Poses T_map_cam [N, 4, 4] of the images that are ``registered`` [N].

    ``known`` says of each image where its features are in the map.
    """

    def __init__(self, shots: Sequence[Shot], root: int, alignment: PairAlignment) -> None:
        self.T_map_cam = np.tile(np.eye(4), (len(shots), 1, 1))
        self.registered = np.zeros(len(shots), bool)
        self.registered[root] = True
        self._shots, self._alignment = shots, alignment
        self._learnt: dict[int, Known] = {}
        self._turns: dict[int, list[PairGeometry]] = {}

    def known(self, image: int) -> Known:
        """Points [F, 3] in the map of all features of an image, and their confidence [F]."""
        count = len(self._shots[image].features)
        return self._learnt.get(image) or Known(np.full((count, 3), np.nan), np.zeros(count))

    def register(self, pair: PairGeometry) -> bool:
        """Place image j beside image i of a pair; False where they share too little."""
        placed = self._placed(pair)
        if placed is None:
            return False
        self.T_map_cam[pair.j] = placed.pose(pair.T_i_j)
        self.registered[pair.j] = True
        if pair.is_turn:
            for seen in (pair, pair.seen_from(pair.j)):
                self._turns.setdefault(seen.i, []).append(seen)
        else:
            found = Known(placed.points(pair.points), pair.confidence)
            self._fuse(pair.i, pair.feature_i, found)
            self._learn(pair.i, pair.feature_i, found)
            self._learn(pair.j, pair.feature_j, found)
        self._hand_on(pair.i, pair.j)
        return True

    def _hand_on(self, *images: int) -> None:
        """Images from one place know what the others of them know, also what they learn later."""
        changed = list(images)
        while changed:
            for turn in self._turns.get(changed.pop(), []):
                if self._learn(turn.j, turn.feature_j, self.known(turn.i).of(turn.feature_i)):
                    changed.append(turn.j)

    def _placed(self, pair: PairGeometry) -> PairPlacement | None:
        """Where a pair lies; the first one with parallax defines the unit."""
        T_map_i = self.T_map_cam[pair.i]
        if pair.is_turn or not self._learnt:
            return PairPlacement(T_map_i)
        return self._alignment.placed(T_map_i, Known(pair.points, pair.confidence),
                                      self.known(pair.i).of(pair.feature_i))

    def _fuse(self, image: int, feature: np.ndarray, found: Known) -> None:
        known = self.known(image)
        known.confidence[feature] = self._alignment.fused(found, known.of(feature))

    def _learn(self, image: int, feature: np.ndarray, new: Known) -> bool:
        """Keep the points that are better than what was known; whether there are any."""
        known = self.known(image)
        better = self._alignment.better(new, known.of(feature))
        if not better.any():
            return False
        known.points[feature[better]] = new.points[better]
        known.confidence[feature[better]] = new.confidence[better]
        self._learnt[image] = known
        return True


def accumulate(shots: Sequence[Shot], pairs: Pairs, root: int, edges: Iterable[Edge],
               way: str = 'depth') -> Accumulation:
    """Register images along the edges (parent, child) of a tree, then those that were left.

    An image that shares too little with its parent is placed beside another one that it makes a
    pair with, the one with most matches first. way: of ``ALIGNMENTS``.
    """
    done = Accumulation(shots, root, ALIGNMENTS[way])
    for parent, child in edges:
        if done.registered[parent]:
            done.register(pairs[min(parent, child), max(parent, child)].seen_from(parent))
    by_size = sorted(pairs.values(), key=lambda pair: -len(pair))
    progress = True
    while progress:
        progress = False
        for pair in by_size:
            known = done.registered[[pair.i, pair.j]]
            if known.sum() == 1:
                progress |= done.register(pair.seen_from(pair.i if known[0] else pair.j))
    return done
