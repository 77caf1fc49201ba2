"""Poses from pairs: each pair is scaled to what its first image knows already.

Light3R-SfM puts pointmaps together by Procrustes alignment along a tree. Of a pair of the compact
encoder only the unit is unknown once the first image has a pose, so the alignment of its points
with those that this image has already is one number: a weighted median of the ratios of depths,
which wrong points do not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.reconstruction.pairs import Edge, PairGeometry, Pairs
from feedforward_recon.reconstruction.shots import Shot

MIN_SHARED = 8  # points of an image that a pair must share with what is known of it
MIN_CONFIDENCE = 3.0  # of a point that says something about scale: its depth is good to a third


class Accumulation:
    """Poses T_map_cam [N, 4, 4] of the images that are ``registered`` [N].

    Of each image that has any, points [F, 3] in the map of its features, NaN where unknown, and
    their confidence.
    """

    def __init__(self, shots: Sequence[Shot], root: int) -> None:
        self.T_map_cam = np.tile(np.eye(4), (len(shots), 1, 1))
        self.registered = np.zeros(len(shots), bool)
        self.registered[root] = True
        self._shots = shots
        self._learnt: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._turns: dict[int, list[PairGeometry]] = {}

    def register(self, pair: PairGeometry) -> bool:
        """Place image j beside image i of a pair; False where they share too little."""
        scale = self._scale(pair)
        if scale is None:
            return False
        T_i_j = pair.T_i_j.copy()
        T_i_j[:3, 3] *= scale
        self.T_map_cam[pair.j] = self.T_map_cam[pair.i] @ T_i_j
        self.registered[pair.j] = True
        if pair.is_turn:
            for seen in (pair, pair.seen_from(pair.j)):
                self._turns.setdefault(seen.i, []).append(seen)
        else:
            points = transform_points(self.T_map_cam[pair.i], scale * pair.points)
            self._learn(pair.i, pair.feature_i, points, pair.confidence)
            self._learn(pair.j, pair.feature_j, points, pair.confidence)
        self._hand_on(pair.i, pair.j)
        return True

    def _hand_on(self, *images: int) -> None:
        """Images from one place know what the others of them know, also what they learn later."""
        changed = list(images)
        while changed:
            for turn in self._turns.get(changed.pop(), []):
                points, confidence = self._known(turn.i)
                if self._learn(turn.j, turn.feature_j, points[turn.feature_i],
                               confidence[turn.feature_i]):
                    changed.append(turn.j)

    def _scale(self, pair: PairGeometry) -> float | None:
        """Map units per unit of the pair; the first pair with parallax defines them."""
        if pair.is_turn or not self._learnt:
            return 1.0
        points, sure = (known[pair.feature_i] for known in self._known(pair.i))
        depth = transform_points(inverse(self.T_map_cam[pair.i]), points)[:, 2]
        confidence = np.minimum(pair.confidence, sure)
        with np.errstate(invalid='ignore'):
            shared = (depth > 0) & (pair.points[:, 2] > 0) & (confidence > MIN_CONFIDENCE)
        if shared.sum() < MIN_SHARED:
            return None
        ratio = np.log(depth[shared] / pair.points[shared, 2])
        return float(np.exp(_weighted_median(ratio, confidence[shared])))

    def _learn(self, image: int, feature: np.ndarray, points: np.ndarray, confidence: np.ndarray
               ) -> bool:
        """Keep the points that are surer than what was known; whether there are any."""
        known, sure = self._known(image)
        better = (confidence > sure[feature]) & np.isfinite(points[:, 0])
        if not better.any():
            return False
        known[feature[better]] = points[better]
        sure[feature[better]] = confidence[better]
        self._learnt[image] = known, sure
        return True

    def _known(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._shots[image].features)
        return self._learnt.get(image) or (np.full((count, 3), np.nan), np.zeros(count))


def accumulate(shots: Sequence[Shot], pairs: Pairs, root: int, edges: Iterable[Edge]
               ) -> Accumulation:
    """Register images along the edges (parent, child) of a tree, then those that were left.

    An image that shares too little with its parent is placed beside another one that it makes a
    pair with, the one with most matches first.
    """
    done = Accumulation(shots, root)
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


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])
